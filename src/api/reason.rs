//! One vocabulary for condition reasons, Event reasons and metric labels.

/// Why a job is in the state it is in. Fixed and small, so that it can be a metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    // --- on its way ---
    /// The intent is recorded; the input is on its way to Gemini.
    Submitting,
    /// Gemini has the batch.
    Submitted,
    /// Gemini refused for lack of quota; tried again later.
    WaitingForQuota,
    /// Gemini does not answer, or answers with errors that pass.
    GeminiUnavailable,
    /// It is not known whether Gemini created the batch; it is being looked for.
    SubmissionUnconfirmed,
    /// The batch ended, but its result file can't be read yet.
    ResultsNotReadable,

    // --- somebody has to change something; the job goes on by itself then ---
    /// The Secret, or the key inside it, does not exist.
    CredentialsNotFound,
    /// What the Secret holds can't be an API key.
    CredentialsInvalid,
    /// Gemini refuses the API key.
    CredentialsRefused,
    /// Another API key than the one the batch was sent with, and Gemini does not show it the batch.
    CredentialsChanged,
    /// The input ConfigMap, or the key inside it, does not exist.
    InputNotFound,
    /// The input is not what Gemini accepts.
    InputInvalid,
    /// The input is larger than allowed.
    InputTooLarge,
    /// The output object exists and was not made for this job.
    OutputConflict,
    /// The results do not fit into the output object.
    OutputTooLarge,
    /// The output object can't be written.
    OutputNotWritable,
    /// The job was written for a newer operator, or past its schema.
    Unreadable,
    /// Gemini refuses to create batches for this API key's project.
    PreconditionFailed,

    // --- final ---
    /// The model does not exist, or not for batches, or not for this API key.
    ModelNotFound,
    /// Gemini refuses the input file.
    InputRefused,
    /// The `geminiFile` does not exist for this API key.
    InputFileNotFound,
    /// Gemini says that the batch failed.
    BatchFailed,
    /// Gemini gave the batch up after its time limit.
    BatchExpired,
    /// Somebody cancelled the batch.
    BatchCancelled,
    /// The batch does not exist at Gemini any more.
    BatchNotFound,
    /// The batch succeeded, but its result file can't be had.
    ResultsLost,
    /// The batch ended and no request has a response.
    AllRequestsFailed,
    /// Every request has a response.
    Completed,
    /// Some requests have a response.
    CompletedWithFailures,

    /// A callback that came after the end says otherwise.
    ContradictingCallback,

    // --- deletion ---
    /// The batch was cancelled because the job is being deleted.
    Cancelled,
    /// The job was deleted after its batch had ended.
    Deleted,
    /// The job was deleted, but its batch could not be cancelled.
    Orphaned,
}

impl Reason {
    /// All reasons, for documentation and for tests that none is forgotten.
    pub const ALL: [Self; 33] = [
        Self::Submitting,
        Self::Submitted,
        Self::WaitingForQuota,
        Self::GeminiUnavailable,
        Self::SubmissionUnconfirmed,
        Self::ResultsNotReadable,
        Self::CredentialsNotFound,
        Self::CredentialsInvalid,
        Self::CredentialsRefused,
        Self::CredentialsChanged,
        Self::InputNotFound,
        Self::InputInvalid,
        Self::InputTooLarge,
        Self::OutputConflict,
        Self::OutputTooLarge,
        Self::OutputNotWritable,
        Self::Unreadable,
        Self::PreconditionFailed,
        Self::ModelNotFound,
        Self::InputRefused,
        Self::InputFileNotFound,
        Self::BatchFailed,
        Self::BatchExpired,
        Self::BatchCancelled,
        Self::BatchNotFound,
        Self::ResultsLost,
        Self::AllRequestsFailed,
        Self::Completed,
        Self::CompletedWithFailures,
        Self::ContradictingCallback,
        Self::Cancelled,
        Self::Deleted,
        Self::Orphaned,
    ];

    /// The reason as conditions, Events and metrics spell it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Submitting => "Submitting",
            Self::Submitted => "Submitted",
            Self::WaitingForQuota => "WaitingForQuota",
            Self::GeminiUnavailable => "GeminiUnavailable",
            Self::SubmissionUnconfirmed => "SubmissionUnconfirmed",
            Self::ResultsNotReadable => "ResultsNotReadable",
            Self::CredentialsNotFound => "CredentialsNotFound",
            Self::CredentialsInvalid => "CredentialsInvalid",
            Self::CredentialsRefused => "CredentialsRefused",
            Self::CredentialsChanged => "CredentialsChanged",
            Self::InputNotFound => "InputNotFound",
            Self::InputInvalid => "InputInvalid",
            Self::InputTooLarge => "InputTooLarge",
            Self::OutputConflict => "OutputConflict",
            Self::OutputTooLarge => "OutputTooLarge",
            Self::OutputNotWritable => "OutputNotWritable",
            Self::Unreadable => "Unreadable",
            Self::PreconditionFailed => "PreconditionFailed",
            Self::ModelNotFound => "ModelNotFound",
            Self::InputRefused => "InputRefused",
            Self::InputFileNotFound => "InputFileNotFound",
            Self::BatchFailed => "BatchFailed",
            Self::BatchExpired => "BatchExpired",
            Self::BatchCancelled => "BatchCancelled",
            Self::BatchNotFound => "BatchNotFound",
            Self::ResultsLost => "ResultsLost",
            Self::AllRequestsFailed => "AllRequestsFailed",
            Self::Completed => "Completed",
            Self::CompletedWithFailures => "CompletedWithFailures",
            Self::ContradictingCallback => "ContradictingCallback",
            Self::Cancelled => "Cancelled",
            Self::Deleted => "Deleted",
            Self::Orphaned => "Orphaned",
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
