//! The watches of several namespaces as if they were one. Client required, but for [`Merge`], which is pure.
//!
//! Where the operator may read only some namespaces, each needs a list and a watch of its own. The rest of the controller
//! knows one: a list that is complete, then changes. So the first list is complete when that of each namespace is, and
//! the list that one of them makes anew later (after its watch broke) becomes the changes since.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use backon::ExponentialBuilder;
use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::utils::{Backoff, ResetTimerBackoff};
use kube::runtime::watcher::{self, Event, ExponentialBackoff, watcher};
use kube::{Api, Client, Resource as _};

use super::watched::{Unreadable, Watched};

type Events = BoxStream<'static, watcher::Result<Event<Watched>>>;

/// The jobs of these namespaces; of all if none is named.
#[must_use]
pub fn jobs(client: &Client, namespaces: &BTreeSet<String>) -> Vec<Api<Watched>> {
    if namespaces.is_empty() {
        return vec![Api::all(client.clone())];
    }
    namespaces.iter().map(|namespace| Api::namespaced(client.clone(), namespace)).collect()
}

/// Watches all of them. After an error each pauses by itself: one that fails holds no other one up.
#[must_use]
pub fn watch(jobs: Vec<Api<Watched>>) -> Events {
    let each = jobs
        .into_iter()
        .map(|jobs| watcher(jobs, watcher::Config::default().page_size(100)).backoff(pauses()).boxed());
    merged(each.collect())
}

/// Short: after an outage of the API server jobs shall go on soon. One list and one watch are asked for.
fn pauses() -> Pauses {
    let pauses = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(500))
        .with_max_delay(Duration::from_secs(10))
        .with_jitter()
        .without_max_times();
    Pauses(ResetTimerBackoff::new(ExponentialBackoff::from(pauses), Duration::from_mins(2)))
}

/// They begin anew when all has been well for a while. That is all that counts: a watcher tells the beginning of each list
/// as an event, so a list that fails time and again would never be asked for less often.
struct Pauses(ResetTimerBackoff<ExponentialBackoff>);

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.0.next()
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {}
}

fn merged(mut watches: Vec<Events>) -> Events {
    if watches.len() == 1 {
        return watches.remove(0);
    }
    let mut merge = Merge::of(watches.len());
    let numbered =
        watches.into_iter().enumerate().map(|(at, events)| events.map_ok(move |event| (at, event)).boxed());
    stream::select_all(numbered)
        .map_ok(move |(at, event)| stream::iter(merge.take(at, event).into_iter().map(Ok)))
        .try_flatten()
        .boxed()
}

/// What has been seen of each watch.
struct Merge {
    parts: Vec<Part>,
    /// Watches whose first list is not complete.
    missing: usize,
}

#[derive(Default)]
struct Part {
    /// Its first list was complete.
    listed: bool,
    /// What the list in progress has shown.
    listing: Vec<Watched>,
    /// Who the jobs are that are there, by name.
    there: HashMap<String, ObjectMeta>,
}

impl Merge {
    fn of(watches: usize) -> Self {
        Self { parts: std::iter::repeat_with(Part::default).take(watches).collect(), missing: watches }
    }

    /// What an event of the watch number `at` is to all of them together.
    fn take(&mut self, at: usize, event: Event<Watched>) -> Vec<Event<Watched>> {
        let Some(part) = self.parts.get_mut(at) else { return Vec::new() };
        match event {
            Event::Init => {
                part.listing.clear();
                // Begun again while others are still being listed: not complete any more.
                if self.missing > 0 && part.listed {
                    part.listed = false;
                    self.missing += 1;
                }
                Vec::new()
            }
            Event::InitApply(job) => {
                part.listing.push(job);
                Vec::new()
            }
            Event::InitDone if part.listed => part.relisted(),
            Event::InitDone => {
                part.listed = true;
                self.missing -= 1;
                if self.missing > 0 {
                    return Vec::new();
                }
                let mut all = vec![Event::Init];
                for part in &mut self.parts {
                    all.extend(part.enter().into_iter().map(Event::InitApply));
                }
                all.push(Event::InitDone);
                all
            }
            // A namespace that is complete may change while others are still being listed.
            Event::Apply(job) if self.missing > 0 => {
                part.listing.retain(|other| other.meta().name != job.meta().name);
                part.listing.push(job);
                Vec::new()
            }
            Event::Delete(job) if self.missing > 0 => {
                part.listing.retain(|other| other.meta().name != job.meta().name);
                Vec::new()
            }
            Event::Apply(job) => {
                part.there.insert(name(&job), who(&job));
                vec![Event::Apply(job)]
            }
            Event::Delete(job) => {
                part.there.remove(&name(&job));
                vec![Event::Delete(job)]
            }
        }
    }
}

impl Part {
    /// The list is complete and becomes what is there.
    fn enter(&mut self) -> Vec<Watched> {
        self.there = self.listing.iter().map(|job| (name(job), who(job))).collect();
        std::mem::take(&mut self.listing)
    }

    /// A list that was made anew, as the changes since the last one.
    fn relisted(&mut self) -> Vec<Event<Watched>> {
        let before = std::mem::take(&mut self.there);
        let jobs = self.enter();
        let gone = before
            .into_iter()
            .filter(|(name, there)| self.there.get(name).map(|t| &t.uid) != Some(&there.uid));
        let mut changes: Vec<_> = gone.map(|(_, there)| Event::Delete(gone_job(there))).collect();
        changes.extend(jobs.into_iter().map(Event::Apply));
        changes
    }
}

fn name(job: &Watched) -> String {
    job.meta().name.clone().unwrap_or_default()
}

/// As much of its metadata as tells which job it is.
fn who(job: &Watched) -> ObjectMeta {
    let ObjectMeta { name, namespace, uid, .. } = job.meta().clone();
    ObjectMeta { name, namespace, uid, ..ObjectMeta::default() }
}

/// Stands for a job that was deleted unseen: nobody reads more of it than who it was.
fn gone_job(metadata: ObjectMeta) -> Watched {
    Watched(Err(Unreadable { metadata, error: "deleted".to_owned() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(namespace: &str, name: &str, uid: &str) -> Watched {
        let text = format!(
            r#"{{"metadata":{{"namespace":"{namespace}","name":"{name}","uid":"{uid}"}},"spec":{{"model":"m"}}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    fn told(events: &[Event<Watched>]) -> Vec<String> {
        let one = |event: &Event<Watched>| match event {
            Event::Init => "init".to_owned(),
            Event::InitDone => "done".to_owned(),
            Event::InitApply(job) => format!("list {}", who_text(job)),
            Event::Apply(job) => format!("apply {}", who_text(job)),
            Event::Delete(job) => format!("delete {}", who_text(job)),
        };
        let mut told: Vec<String> = events.iter().map(one).collect();
        // The order of deletions among themselves does not matter.
        told.sort_by_key(|text| text.starts_with("delete").then(|| text.clone()));
        told
    }

    fn who_text(job: &Watched) -> String {
        let ObjectMeta { namespace, name, uid, .. } = job.meta();
        [namespace, name, uid].map(|part| part.as_deref().unwrap_or("?")).join("/")
    }

    /// All that comes of these events, in order.
    fn merged(watches: usize, events: Vec<(usize, Event<Watched>)>) -> Vec<Vec<String>> {
        let mut merge = Merge::of(watches);
        events.into_iter().map(|(at, event)| told(&merge.take(at, event))).collect()
    }

    #[test]
    fn the_list_is_complete_when_all_namespaces_are() {
        let nothing: Vec<String> = Vec::new();
        let told = merged(
            2,
            vec![
                (0, Event::Init),
                (1, Event::Init),
                (0, Event::InitApply(job("a", "x", "1"))),
                (0, Event::InitApply(job("a", "y", "2"))),
                (0, Event::InitDone),
                // meanwhile
                (0, Event::Delete(job("a", "x", "1"))),
                (0, Event::Apply(job("a", "y", "2"))),
                (0, Event::Apply(job("a", "z", "3"))),
                (1, Event::InitApply(job("b", "x", "4"))),
                (1, Event::InitDone),
                (1, Event::Apply(job("b", "x", "4"))),
                (0, Event::Delete(job("a", "z", "3"))),
            ],
        );
        assert!(told[..9].iter().all(|events| *events == nothing), "{told:?}");
        assert_eq!(told[9], ["init", "list a/y/2", "list a/z/3", "list b/x/4", "done"]);
        assert_eq!(
            (told[10].clone(), told[11].clone()),
            (vec!["apply b/x/4".to_owned()], vec!["delete a/z/3".to_owned()])
        );
    }

    #[test]
    fn a_list_made_anew_tells_what_was_missed_and_touches_no_other_namespace() {
        let told = merged(
            2,
            vec![
                (0, Event::Init),
                (0, Event::InitApply(job("a", "stays", "1"))),
                (0, Event::InitApply(job("a", "goes", "2"))),
                (0, Event::InitApply(job("a", "replaced", "3"))),
                (0, Event::InitDone),
                (1, Event::Init),
                (1, Event::InitApply(job("b", "goes", "4"))),
                (1, Event::InitDone),
                (0, Event::Apply(job("a", "came", "5"))),
                // The watch broke; one that breaks off is begun again.
                (0, Event::Init),
                (0, Event::InitApply(job("a", "replaced", "3"))),
                (0, Event::Init),
                (0, Event::InitApply(job("a", "stays", "1"))),
                (0, Event::InitApply(job("a", "replaced", "6"))),
                (0, Event::InitDone),
            ],
        );
        assert_eq!(
            told[14],
            [
                "apply a/stays/1",
                "apply a/replaced/6",
                "delete a/came/5",
                "delete a/goes/2",
                "delete a/replaced/3"
            ]
        );
    }

    /// Whatever order the watches come in: what is told adds up to what is there, and nothing is told before the one
    /// list that is complete.
    #[test]
    fn a_list_that_is_begun_again_before_the_others_are_complete_is_waited_for() {
        let list = |at: usize, jobs: &[(&str, &str)]| {
            let (namespace, mut events) = (["a", "b"][at], vec![(at, Event::Init)]);
            events.extend(jobs.iter().map(|(name, uid)| (at, Event::InitApply(job(namespace, name, uid)))));
            events
        };
        let done = |at: usize| vec![(at, Event::InitDone)];
        let (a, b) = (list(0, &[("x", "1"), ("y", "2")]), list(1, &[("x", "3")]));
        // a is listed again, whole, while b is missing; b is complete in the midst of a's second list.
        let whole = [a.clone(), done(0), a.clone(), done(0), b.clone(), done(1)].concat();
        let midst = [a.clone(), done(0), a[..2].to_vec(), b, done(1), a[2..].to_vec(), done(0)].concat();
        for events in [whole, midst] {
            let told: Vec<String> = merged(2, events).concat();
            assert_eq!(told, ["init", "list a/x/1", "list a/y/2", "list b/x/3", "done"]);
        }
    }

    #[test]
    fn a_job_that_was_replaced_by_one_of_its_name_goes_before_the_other_comes() {
        let mut merge = Merge::of(2);
        for event in [Event::InitApply(job("a", "x", "1")), Event::InitDone] {
            merge.take(0, event);
        }
        merge.take(1, Event::InitDone);
        merge.take(0, Event::InitApply(job("a", "x", "2")));
        let changes = merge.take(0, Event::InitDone);
        let [Event::Delete(old), Event::Apply(new)] = &changes[..] else { panic!("{changes:?}") };
        assert_eq!((who_text(old), who_text(new)), ("a/x/1".to_owned(), "a/x/2".to_owned()));
    }

    #[tokio::test]
    async fn an_error_of_one_watch_is_told_and_ends_none() {
        let broken = |events: Vec<watcher::Result<Event<Watched>>>| stream::iter(events).boxed();
        let watches = vec![
            broken(vec![Ok(Event::Init), Err(watcher::Error::NoResourceVersion), Ok(Event::InitDone)]),
            broken(vec![Ok(Event::Init), Ok(Event::InitApply(job("b", "x", "1"))), Ok(Event::InitDone)]),
        ];
        let all: Vec<_> = super::merged(watches).collect().await;
        assert_eq!(all.iter().filter(|event| event.is_err()).count(), 1);
        let events: Vec<Event<Watched>> = all.into_iter().flatten().collect();
        assert_eq!(told(&events), ["init", "list b/x/1", "done"]);
    }
}
