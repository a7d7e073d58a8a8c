//! What the watch shows of children, and who wakes their parents. No requests of its own.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Arc, Mutex, PoisonError};

use futures::channel::mpsc::UnboundedSender;
use kube::Resource as _;
use kube::runtime::reflector::{ObjectRef, Store};

use super::{parent_of, stalled};
use crate::api::conditions::{self, READY};
use crate::controller::watched::Watched;

/// All jobs as the watch has them, while this process leads.
#[derive(Default)]
pub struct Family(Mutex<Option<Inner>>);

struct Inner {
    store: Store<Watched>,
    poke: UnboundedSender<ObjectRef<Watched>>,
    /// Of each child, by UID: what its parent was woken for last.
    told: HashMap<String, u64>,
}

impl Family {
    /// A turn of leadership begins.
    pub fn begin(&self, store: Store<Watched>, poke: UnboundedSender<ObjectRef<Watched>>) {
        *self.lock() = Some(Inner { store, poke, told: HashMap::new() });
    }

    /// It is over.
    pub fn end(&self) {
        *self.lock() = None;
    }

    /// The job of that name, if the watch has shown it.
    #[must_use]
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<Watched>> {
        let inner = self.lock();
        inner.as_ref()?.store.get(&ObjectRef::new(name).within(namespace))
    }

    /// The watch shows this job. If it is a child, and something changed that its parent goes by, its parent is woken;
    /// `unsettle` is told the parent's UID first.
    pub fn shows(&self, job: &Watched, gone: bool, unsettle: impl FnOnce(&str)) {
        let meta = job.meta();
        let Some(owner) = parent_of(meta) else { return };
        let mut inner = self.lock();
        let Some(inner) = inner.as_mut() else { return };
        let uid = meta.uid.clone().unwrap_or_default();
        let digest = digest(job);
        if gone {
            inner.told.remove(&uid);
        } else if inner.told.insert(uid, digest) == Some(digest) {
            return;
        }
        unsettle(&owner.uid);
        let parent = ObjectRef::new(&owner.name).within(meta.namespace.as_deref().unwrap_or_default());
        let _ = inner.poke.unbounded_send(parent); // fails when the turn is over
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Inner>> {
        // Valid after any panic: each change is one insert, remove or assignment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Of all that a parent goes by. Attempts come and go without it.
fn digest(job: &Watched) -> u64 {
    let mut hasher = DefaultHasher::new();
    job.meta().generation.hash(&mut hasher);
    job.meta().deletion_timestamp.is_some().hash(&mut hasher);
    let Ok(job) = &job.0 else { return hasher.finish() };
    let Some(status) = &job.status else { return hasher.finish() };
    status.state.hash(&mut hasher);
    status.observed_generation.hash(&mut hasher);
    if let Some(r) = &status.requests {
        (r.total, r.succeeded, r.failed).hash(&mut hasher);
    }
    if let Some(u) = &status.usage {
        (u.prompt_tokens, u.output_tokens, u.total_tokens).hash(&mut hasher);
    }
    status.completion_time.is_some().hash(&mut hasher);
    conditions::get(&status.conditions, READY).map(|c| &c.reason).hash(&mut hasher);
    stalled(job).map(|c| (&c.reason, &c.message)).hash(&mut hasher);
    hasher.finish()
}
