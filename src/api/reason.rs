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
    /// Gemini refused to call back; the batch is asked for without a webhook, and polled.
    WebhookRefused,
    /// As many batches of this API key run as the operator lets run at once.
    WaitingForSlot,
    /// With `spec.dryRun`: all that a submission needs is there.
    DryRunSucceeded,
    /// An administrator paused all submissions.
    SubmissionsPaused,
    /// The installed `CustomResourceDefinition` is older than the operator.
    CrdOutdated,
    /// `spec.suspend` holds the job.
    Suspended,
    /// The batch is being cancelled.
    Cancelling,
    /// The last batch did not finish, or requests in it failed; a further one carries them.
    Retrying,
    /// Some requests failed with codes that `spec.retryPolicy` sends again; a further batch carries them.
    RequestsFailed,
    /// Gemini does not answer, or answers with errors that pass.
    GeminiUnavailable,
    /// It is not known whether Gemini created the batch; it is being looked for.
    SubmissionUnconfirmed,
    /// The batch ended, but its result file can't be read yet.
    ResultsNotReadable,
    /// The input is being read from an object store, or is on its way from there to Gemini.
    WaitingForTransfer,
    /// The object store does not answer, or answers with errors that pass.
    StoreUnavailable,

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
    /// The input is not the one that was split, or this part of it is not.
    InputDiffers,
    /// The job of a shard can't be created.
    ShardNotCreated,
    /// The object store refuses the credentials.
    StoreAccessDenied,
    /// An administrator has not allowed this endpoint, this directory, or the operator's own identity.
    StoreNotAllowed,
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
    /// A defect of the operator: the work on the job panicked. It is tried again.
    InternalError,

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
    /// `activeDeadlineSeconds` have passed.
    DeadlineExceeded,
    /// The input was changed after the first attempt, so a further one can't be told what is missing.
    InputChanged,
    /// The input is somebody else's file, so a further attempt can't be told what is missing.
    InputUnknown,
    /// As many attempts as a job can have.
    AttemptsExhausted,
    /// The batch ended and no request has a response.
    AllRequestsFailed,
    /// More requests failed than `spec.successPolicy` allows.
    TooManyFailedRequests,
    /// Some shards ended without their results.
    ShardsFailed,
    /// Every request has a response.
    Completed,
    /// Some requests have a response.
    CompletedWithFailures,

    /// A callback that came after the end says otherwise.
    ContradictingCallback,
    /// A second batch of the same attempt turned up and was cancelled.
    DuplicateCancelled,

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
    pub const ALL: [Self; 56] = [
        Self::Submitting,
        Self::Submitted,
        Self::WaitingForQuota,
        Self::WebhookRefused,
        Self::WaitingForSlot,
        Self::DryRunSucceeded,
        Self::SubmissionsPaused,
        Self::CrdOutdated,
        Self::Suspended,
        Self::Cancelling,
        Self::Retrying,
        Self::RequestsFailed,
        Self::GeminiUnavailable,
        Self::SubmissionUnconfirmed,
        Self::ResultsNotReadable,
        Self::WaitingForTransfer,
        Self::StoreUnavailable,
        Self::CredentialsNotFound,
        Self::CredentialsInvalid,
        Self::CredentialsRefused,
        Self::CredentialsChanged,
        Self::InputNotFound,
        Self::InputInvalid,
        Self::InputTooLarge,
        Self::InputDiffers,
        Self::ShardNotCreated,
        Self::StoreAccessDenied,
        Self::StoreNotAllowed,
        Self::OutputConflict,
        Self::OutputTooLarge,
        Self::OutputNotWritable,
        Self::Unreadable,
        Self::PreconditionFailed,
        Self::InternalError,
        Self::ModelNotFound,
        Self::InputRefused,
        Self::InputFileNotFound,
        Self::BatchFailed,
        Self::BatchExpired,
        Self::BatchCancelled,
        Self::BatchNotFound,
        Self::ResultsLost,
        Self::DeadlineExceeded,
        Self::InputChanged,
        Self::InputUnknown,
        Self::AttemptsExhausted,
        Self::AllRequestsFailed,
        Self::TooManyFailedRequests,
        Self::ShardsFailed,
        Self::Completed,
        Self::CompletedWithFailures,
        Self::ContradictingCallback,
        Self::DuplicateCancelled,
        Self::Cancelled,
        Self::Deleted,
        Self::Orphaned,
    ];

    /// Whether a job can have ended with it: the section "final" above.
    #[must_use]
    pub fn is_final(self) -> bool {
        (Self::ModelNotFound..=Self::CompletedWithFailures).contains(&self)
    }

    /// The reason that is spelled so.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == text)
    }

    /// The reason as conditions, Events and metrics spell it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Submitting => "Submitting",
            Self::Submitted => "Submitted",
            Self::WaitingForQuota => "WaitingForQuota",
            Self::WebhookRefused => "WebhookRefused",
            Self::WaitingForSlot => "WaitingForSlot",
            Self::DryRunSucceeded => "DryRunSucceeded",
            Self::SubmissionsPaused => "SubmissionsPaused",
            Self::CrdOutdated => "CrdOutdated",
            Self::Suspended => "Suspended",
            Self::Cancelling => "Cancelling",
            Self::Retrying => "Retrying",
            Self::RequestsFailed => "RequestsFailed",
            Self::GeminiUnavailable => "GeminiUnavailable",
            Self::SubmissionUnconfirmed => "SubmissionUnconfirmed",
            Self::ResultsNotReadable => "ResultsNotReadable",
            Self::WaitingForTransfer => "WaitingForTransfer",
            Self::StoreUnavailable => "StoreUnavailable",
            Self::CredentialsNotFound => "CredentialsNotFound",
            Self::CredentialsInvalid => "CredentialsInvalid",
            Self::CredentialsRefused => "CredentialsRefused",
            Self::CredentialsChanged => "CredentialsChanged",
            Self::InputNotFound => "InputNotFound",
            Self::InputInvalid => "InputInvalid",
            Self::InputTooLarge => "InputTooLarge",
            Self::InputDiffers => "InputDiffers",
            Self::ShardNotCreated => "ShardNotCreated",
            Self::StoreAccessDenied => "StoreAccessDenied",
            Self::StoreNotAllowed => "StoreNotAllowed",
            Self::OutputConflict => "OutputConflict",
            Self::OutputTooLarge => "OutputTooLarge",
            Self::OutputNotWritable => "OutputNotWritable",
            Self::Unreadable => "Unreadable",
            Self::PreconditionFailed => "PreconditionFailed",
            Self::InternalError => "InternalError",
            Self::ModelNotFound => "ModelNotFound",
            Self::InputRefused => "InputRefused",
            Self::InputFileNotFound => "InputFileNotFound",
            Self::BatchFailed => "BatchFailed",
            Self::BatchExpired => "BatchExpired",
            Self::BatchCancelled => "BatchCancelled",
            Self::BatchNotFound => "BatchNotFound",
            Self::ResultsLost => "ResultsLost",
            Self::DeadlineExceeded => "DeadlineExceeded",
            Self::InputChanged => "InputChanged",
            Self::InputUnknown => "InputUnknown",
            Self::AttemptsExhausted => "AttemptsExhausted",
            Self::AllRequestsFailed => "AllRequestsFailed",
            Self::TooManyFailedRequests => "TooManyFailedRequests",
            Self::ShardsFailed => "ShardsFailed",
            Self::Completed => "Completed",
            Self::CompletedWithFailures => "CompletedWithFailures",
            Self::ContradictingCallback => "ContradictingCallback",
            Self::DuplicateCancelled => "DuplicateCancelled",
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever sees a reason finds it there.
    #[test]
    fn what_a_job_can_end_with_is_told_from_what_it_waits_for() {
        use Reason::{Completed, CompletedWithFailures, ContradictingCallback, InternalError, ModelNotFound};
        assert!([ModelNotFound, Completed, CompletedWithFailures].iter().all(|reason| reason.is_final()));
        assert!(![InternalError, ContradictingCallback, Reason::Submitting].iter().any(|r| r.is_final()));
        assert_eq!(Reason::ALL.iter().filter(|reason| reason.is_final()).count(), 17);
    }

    #[test]
    fn every_reason_is_explained() {
        for (page, docs) in [
            ("lifecycle", include_str!("../../docs/lifecycle.md")),
            ("troubleshooting", include_str!("../../docs/troubleshooting.md")),
        ] {
            let rows: Vec<&str> = docs.lines().filter(|line| line.starts_with("| `")).collect();
            for reason in Reason::ALL {
                assert!(
                    rows.iter().any(|row| row.contains(&format!("`{reason}`"))),
                    "docs/{page}.md lacks {reason}"
                );
            }
        }
    }
}
