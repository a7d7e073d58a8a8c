//! Work that takes as long as an object is large, beside the passes over jobs: a bounded pool of its own, so that other
//! jobs go on meanwhile. No requests of its own.
//!
//! A pass asks for its work and waits a moment, which is enough for what is small. Else it leaves, the job says
//! `WaitingForTransfer`, and is woken when the work is done. Nothing of it survives the turn of leadership.

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use futures::channel::mpsc::UnboundedSender;
use kube::runtime::reflector::ObjectRef;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::AbortOnDropHandle;

use super::watched::Watched;

/// How long a pass waits for its work: long enough for what is small, short enough for others to have their turn.
const PATIENCE: Duration = Duration::from_secs(2);

/// For each that runs at a time, so many may hold results: some are read while others are stored.
const ROOMS_FOR_EACH: usize = 2;

/// Whose work it is.
#[derive(Clone, Debug)]
pub struct Owner {
    /// The job's UID.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// What became of the work so far.
#[derive(Debug)]
pub enum Waited<T> {
    /// It is done.
    Done(T),
    /// It goes on; the job is woken when it is done.
    Running,
    /// It waits for others to be done.
    Queued,
}

/// What work is about. Each kind has as many turns: an input that takes long does not keep results waiting, which expire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reading or sending an input.
    Input,
    /// Reading or storing results.
    Results,
}

/// So many turns at a time, and one less for any namespace: whatever its stores do, the others have their turn.
struct Lane {
    all: Arc<Semaphore>,
    of_one: usize,
    by_namespace: Mutex<HashMap<String, Arc<Semaphore>>>,
}

/// Namespaces that are remembered although nothing of theirs is under way.
const IDLE_NAMESPACES: usize = 256;

/// Given back when it is dropped.
#[derive(Debug)]
pub struct Turn {
    _own: Option<OwnedSemaphorePermit>,
    _any: Option<OwnedSemaphorePermit>,
}

impl Lane {
    fn new(size: usize, of_one: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(size)), of_one, by_namespace: Mutex::default() }
    }

    fn of(&self, namespace: &str) -> Arc<Semaphore> {
        let mut known = lock(&self.by_namespace);
        if known.len() > IDLE_NAMESPACES {
            known.retain(|_, turns| Arc::strong_count(turns) > 1);
        }
        let turns = known.entry(namespace.to_owned());
        Arc::clone(turns.or_insert_with(|| Arc::new(Semaphore::new(self.of_one))))
    }

    fn is_full(&self, namespace: &str) -> bool {
        self.all.available_permits() == 0 || self.of(namespace).available_permits() == 0
    }

    /// First come, first served, among those of one namespace and then among all.
    fn turn(&self, namespace: &str) -> impl Future<Output = Turn> + Send + use<> {
        let (own, any) = (self.of(namespace), Arc::clone(&self.all));
        // Never closed.
        async move { Turn { _own: own.acquire_owned().await.ok(), _any: any.acquire_owned().await.ok() } }
    }
}

/// The right to hold results until they are stored. It is there when the work begins, and given back when it is dropped.
pub type Room = Arc<OnceLock<Turn>>;

/// The pool.
pub struct Transfers {
    inputs: Lane,
    results: Lane,
    /// Results that were read and wait to be stored take memory and the temporary directory, however many jobs end at the
    /// same time: further ones are not read before.
    rooms: Lane,
    size: u16,
    patience: Duration,
    work: Mutex<HashMap<String, Work>>,
    wake: Mutex<Option<UnboundedSender<ObjectRef<Watched>>>>,
}

/// One piece of work, of one job.
struct Work {
    /// What it is: another one takes its place.
    what: String,
    handle: AbortOnDropHandle<Box<dyn Any + Send>>,
    begun: Arc<AtomicBool>,
    end: Arc<Mutex<End>>,
}

/// Who tells whom: the one that comes second.
#[derive(Default)]
struct End {
    done: bool,
    nobody_waits: bool,
}

impl Transfers {
    /// A pool for so many of each kind at a time.
    #[must_use]
    pub fn new(size: u16) -> Self {
        let all = usize::from(size.max(1));
        let of_one = all.saturating_sub(1).max(1);
        Self {
            inputs: Lane::new(all, of_one),
            results: Lane::new(all, of_one),
            rooms: Lane::new(all * ROOMS_FOR_EACH, of_one * ROOMS_FOR_EACH),
            size,
            patience: PATIENCE,
            work: Mutex::default(),
            wake: Mutex::default(),
        }
    }

    /// How many of each kind run at a time.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// A turn of leadership begins: whom to wake, and how.
    pub fn begin(&self, wake: UnboundedSender<ObjectRef<Watched>>) {
        *lock(&self.wake) = Some(wake);
    }

    /// The turn is over, and with it all work.
    pub fn end(&self) {
        *lock(&self.wake) = None;
        lock(&self.work).clear();
    }

    /// Nobody wants the job's work any more.
    pub fn stop(&self, uid: &str) {
        lock(&self.work).remove(uid);
    }

    /// Has the work done, or waits a moment more for it if it is under way. `what` tells it from other work of the job,
    /// which it takes the place of; its result has to be of the same type each time. `woken`: called before the job is
    /// woken.
    pub async fn run<T, F>(
        &self,
        kind: Kind,
        owner: &Owner,
        what: &str,
        woken: impl FnOnce() + Send + 'static,
        work: impl FnOnce() -> F,
    ) -> Waited<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        self.run_in(kind, None, owner, what, woken, work).await
    }

    /// The same for results that are to be held for a while: it begins when there is room for that.
    pub async fn run_with_room<T, F>(
        &self,
        owner: &Owner,
        what: &str,
        woken: impl FnOnce() + Send + 'static,
        work: impl FnOnce(Room) -> F,
    ) -> Waited<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let room = Room::default();
        self.run_in(Kind::Results, Some(Arc::clone(&room)), owner, what, woken, || work(room)).await
    }

    async fn run_in<T, F>(
        &self,
        kind: Kind,
        room: Option<Room>,
        owner: &Owner,
        what: &str,
        woken: impl FnOnce() + Send + 'static,
        work: impl FnOnce() -> F,
    ) -> Waited<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let namespace = &owner.namespace;
        let full = self.lane(kind).is_full(namespace) || room.is_some() && self.rooms.is_full(namespace);
        let before = lock(&self.work).remove(&owner.uid).filter(|before| before.what == what);
        let mut at_hand = before.unwrap_or_else(|| self.start(kind, room, owner, what, woken, work()));
        lock(&at_hand.end).nobody_waits = false;
        let queued = !at_hand.begun.load(Ordering::Relaxed) && full;
        let patience = if queued { Duration::ZERO } else { self.patience };
        let in_time = tokio::time::timeout(patience, &mut at_hand.handle).await;
        let ended = if let Ok(ended) = in_time {
            ended
        } else {
            let done = {
                let mut end = lock(&at_hand.end);
                end.nobody_waits = true;
                end.done
            };
            if !done {
                let begun = at_hand.begun.load(Ordering::Relaxed);
                lock(&self.work).insert(owner.uid.clone(), at_hand);
                return if begun { Waited::Running } else { Waited::Queued };
            }
            (&mut at_hand.handle).await // it is returning
        };
        match ended {
            Ok(result) => match result.downcast::<T>() {
                Ok(result) => Waited::Done(*result),
                Err(_) => Waited::Queued, // never: `what` says which type it is
            },
            // A defect that this job brought to light is this job's.
            Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
            Err(_) => Waited::Queued, // the process ends
        }
    }

    fn lane(&self, kind: Kind) -> &Lane {
        match kind {
            Kind::Input => &self.inputs,
            Kind::Results => &self.results,
        }
    }

    fn start<T: Send + 'static>(
        &self,
        kind: Kind,
        room: Option<Room>,
        owner: &Owner,
        what: &str,
        woken: impl FnOnce() + Send + 'static,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Work {
        let (begun, end) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(End::default())));
        let turn = self.lane(kind).turn(&owner.namespace);
        let room = room.map(|room| (room, self.rooms.turn(&owner.namespace)));
        let wake = lock(&self.wake).clone();
        let job = ObjectRef::new(&owner.name).within(&owner.namespace);
        let (begins, ends) = (Arc::clone(&begun), Arc::clone(&end));
        let handle = tokio::spawn(async move {
            // Whoever waits for room does not keep those from storing who have it.
            if let Some((room, turn)) = room {
                let _ = room.set(turn.await);
            }
            let turn = turn.await;
            begins.store(true, Ordering::Relaxed);
            // Whatever becomes of the work, a panic included, the job is not left waiting.
            let mut told = Told { ends, wake, job, woken: Some(woken) };
            let result: Box<dyn Any + Send> = Box::new(work.await);
            drop(turn);
            told.tell();
            result
        });
        Work { what: what.to_owned(), handle: AbortOnDropHandle::new(handle), begun, end }
    }
}

/// Tells of the end, and if need be when it goes.
struct Told<W: FnOnce()> {
    ends: Arc<Mutex<End>>,
    wake: Option<UnboundedSender<ObjectRef<Watched>>>,
    job: ObjectRef<Watched>,
    woken: Option<W>,
}

impl<W: FnOnce()> Drop for Told<W> {
    fn drop(&mut self) {
        // Not if nobody wants it any more.
        if std::thread::panicking() {
            self.tell();
        }
    }
}

impl<W: FnOnce()> Told<W> {
    fn tell(&mut self) {
        let mut end = lock(&self.ends);
        end.done = true;
        if !end.nobody_waits {
            return;
        }
        drop(end);
        if let Some(woken) = self.woken.take() {
            woken();
        }
        if let Some(wake) = &self.wake {
            // Closed only when the turn of leadership is over.
            let _ = wake.unbounded_send(self.job.clone());
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Valid after any panic: each change is one insert, remove or assignment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::channel::mpsc::{UnboundedReceiver, unbounded};
    use futures::{FutureExt as _, StreamExt as _};
    use tokio::sync::oneshot;

    fn owner(name: &str) -> Owner {
        Owner { uid: format!("uid-{name}"), namespace: "ns".into(), name: name.into() }
    }

    fn pool(size: u16) -> (Transfers, UnboundedReceiver<ObjectRef<Watched>>) {
        let (wake, woken) = unbounded();
        let pool = Transfers { patience: Duration::from_millis(20), ..Transfers::new(size) };
        pool.begin(wake);
        (pool, woken)
    }

    async fn run(
        pool: &Transfers,
        name: &str,
        what: &str,
        work: oneshot::Receiver<u8>,
    ) -> Waited<Result<u8, oneshot::error::RecvError>> {
        pool.run(Kind::Input, &owner(name), what, || {}, || work).await
    }

    #[tokio::test]
    async fn what_is_small_is_waited_for_and_nobody_is_woken() {
        let (pool, mut woken) = pool(1);
        let (done, work) = oneshot::channel();
        done.send(7).unwrap();
        assert!(matches!(run(&pool, "a", "read", work).await, Waited::Done(Ok(7))));
        assert!(woken.next().now_or_never().is_none());
    }

    #[tokio::test]
    async fn what_is_large_goes_on_alone_and_its_job_is_woken_once() {
        let (pool, mut woken) = pool(1);
        let (done, work) = oneshot::channel();
        assert!(matches!(run(&pool, "a", "read", work).await, Waited::Running));
        assert!(woken.next().now_or_never().is_none());
        done.send(7).unwrap();
        assert_eq!(woken.next().await.unwrap().name, "a");
        let (_never, unused) = oneshot::channel();
        assert!(matches!(run(&pool, "a", "read", unused).await, Waited::Done(Ok(7))));
        assert!(woken.next().now_or_never().is_none());
    }

    #[tokio::test]
    async fn no_more_run_than_there_is_room_for_and_the_others_follow() {
        let (pool, mut woken) = pool(1);
        let (first, work) = oneshot::channel();
        assert!(matches!(run(&pool, "a", "read", work).await, Waited::Running));
        let (second, work) = oneshot::channel();
        assert!(matches!(run(&pool, "b", "read", work).await, Waited::Queued));
        first.send(1).unwrap();
        assert_eq!(woken.next().await.unwrap().name, "a");
        second.send(2).unwrap();
        assert_eq!(woken.next().await.unwrap().name, "b");
    }

    /// However many jobs end at the same time: so many hold results, and storing them goes before reading more.
    #[tokio::test]
    async fn no_more_results_are_held_than_there_is_room_for() {
        let (pool, mut woken) = pool(1);
        let read = async |name: &str| {
            let done = pool.run_with_room(&owner(name), "read", || {}, |room| async move { room }).await;
            if let Waited::Done(room) = done { Some(room) } else { None }
        };
        let (first, second) = (read("a").await.unwrap(), read("b").await.unwrap());
        assert!(read("c").await.is_none());
        let stored: Waited<u8> = pool.run(Kind::Results, &owner("a"), "store", || {}, || async { 1 }).await;
        assert!(matches!(stored, Waited::Done(1)));
        drop(first);
        assert_eq!(woken.next().await.unwrap().name, "c");
        assert!(read("c").await.is_some());
        drop(second);
    }

    /// Results expire.
    #[tokio::test]
    async fn results_do_not_wait_for_inputs() {
        let (pool, _woken) = pool(1);
        let (_goes_on, work) = oneshot::channel();
        assert!(matches!(run(&pool, "a", "read", work).await, Waited::Running));
        let stored: Waited<u8> = pool.run(Kind::Results, &owner("b"), "store", || {}, || async { 1 }).await;
        assert!(matches!(stored, Waited::Done(1)));
    }

    #[tokio::test]
    async fn a_namespace_whose_stores_are_slow_leaves_the_others_a_turn() {
        let (pool, mut woken) = pool(3);
        let mut goes_on = Vec::new();
        let mut begin = async |namespace: &str, name: &str| {
            let (done, work) = oneshot::channel::<u8>();
            goes_on.push((name.to_owned(), done));
            let owner = Owner { namespace: namespace.into(), ..owner(name) };
            pool.run(Kind::Results, &owner, "store", || {}, || work).await
        };
        for name in ["a", "b"] {
            assert!(matches!(begin("slow", name).await, Waited::Running));
        }
        assert!(matches!(begin("slow", "c").await, Waited::Queued));
        assert!(matches!(begin("other", "d").await, Waited::Running));
        assert!(matches!(begin("third", "e").await, Waited::Queued));
        // Whose turn it is: not only its namespace's, but anybody's.
        let (_, done) = goes_on.remove(0);
        done.send(1).unwrap();
        assert_eq!(woken.next().await.unwrap().name, "a");
        for name in ["e", "c"] {
            let at = goes_on.iter().position(|(there, _)| there == name).unwrap();
            goes_on.remove(at).1.send(1).unwrap();
        }
        assert_eq!(woken.next().await.unwrap().name, "e");
        assert_eq!(woken.next().await.unwrap().name, "c");
    }

    #[tokio::test]
    async fn other_work_of_the_same_job_takes_its_place() {
        let (pool, _woken) = pool(1);
        let (first, work) = oneshot::channel();
        assert!(matches!(run(&pool, "a", "read 1", work).await, Waited::Running));
        let (second, work) = oneshot::channel();
        second.send(2).unwrap();
        assert!(matches!(run(&pool, "a", "read 2", work).await, Waited::Done(Ok(2))));
        assert!(first.is_closed(), "the first is not under way any more");
    }

    #[tokio::test]
    async fn the_end_of_a_turn_ends_all_work() {
        let (pool, mut woken) = pool(1);
        let (done, work) = oneshot::channel();
        assert!(matches!(run(&pool, "a", "read", work).await, Waited::Running));
        pool.end();
        tokio::task::yield_now().await;
        assert!(done.is_closed());
        assert!(woken.next().await.is_none());
    }

    #[tokio::test]
    async fn a_panic_wakes_the_job_and_is_its_own() {
        let (pool, mut woken) = pool(1);
        let (done, work) = oneshot::channel::<u8>();
        let panics = async move {
            let _ = work.await;
            panic!("a defect")
        };
        let waited: Waited<()> = pool.run(Kind::Input, &owner("a"), "read", || {}, || panics).await;
        assert!(matches!(waited, Waited::Running));
        done.send(1).unwrap();
        assert_eq!(woken.next().await.unwrap().name, "a");
        let a = owner("a");
        let again =
            std::panic::AssertUnwindSafe(pool.run::<(), _>(Kind::Input, &a, "read", || {}, || async {}));
        assert!(again.catch_unwind().await.is_err());
        let free: Waited<u8> = pool.run(Kind::Input, &owner("b"), "read", || {}, || async { 1 }).await;
        assert!(matches!(free, Waited::Done(1)), "its place in the pool is free again");
    }
}
