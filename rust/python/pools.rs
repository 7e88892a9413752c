//! Threads for every call: never rayon's global pool, never a parent process's, never another call's.

use std::mem;
use std::num::NonZero;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// Pools kept for the next call.
const IDLE_POOLS: usize = 4;
/// Threads of a pool for every core, at most: more would only take memory.
const PER_CORE: usize = 4;

/// The pools of one process that nobody uses now, by the number of threads that was asked for; 0 for all cores.
struct Idle {
    process: u32,
    pools: Vec<(usize, ThreadPool)>,
}

static IDLE: Mutex<Idle> = Mutex::new(Idle { process: 0, pools: Vec::new() });

/// The idle pools of this process.
///
/// A child that was forked has its parent's memory but not its threads: work given to the parent's pools would wait
/// forever. The lock is only ever held by a thread that is attached to the interpreter; a fork from Python is alone in
/// being so, by the interpreter's lock, or as a free-threaded one stops all others first. So no child begins with a
/// locked one.
fn idle(_: Python<'_>) -> MutexGuard<'static, Idle> {
    let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    if idle.process != std::process::id() {
        forget(&mut idle);
        idle.process = std::process::id();
    }
    idle
}

/// Runs `work` with a pool of so many threads that is its own meanwhile; one for every core where no number is given.
/// No pool has more than [`PER_CORE`] of them for every core, whatever is asked for: answers do not depend on it.
///
/// Two calls at once would wait for each other's work in one pool, beyond their time limits.
pub(super) fn with_pool<T>(
    py: Python<'_>,
    threads: Option<usize>,
    work: impl FnOnce(&ThreadPool) -> PyResult<T>,
) -> PyResult<T> {
    let largest = || std::thread::available_parallelism().map_or(1, NonZero::get) * PER_CORE;
    let wanted = threads.map_or(0, |threads| threads.clamp(1, largest()));
    let process = std::process::id();
    let idle_pool = {
        let mut idle = idle(py);
        let place = idle.pools.iter().position(|(threads, _)| *threads == wanted);
        place.map(|place| idle.pools.remove(place).1)
    };
    let pool = if let Some(pool) = idle_pool {
        pool
    } else {
        let name = |number| format!("moetuner-{number}");
        let made = ThreadPoolBuilder::new().num_threads(wanted).thread_name(name).build();
        made.map_err(|error| PyRuntimeError::new_err(format!("threads: {error}")))?
    };
    let result = work(&pool);
    if process != std::process::id() {
        // What was called back has forked, and this is the child.
        mem::forget(pool);
        return result;
    }
    let mut idle = idle(py);
    if idle.pools.len() == IDLE_POOLS {
        idle.pools.remove(0);
    }
    idle.pools.push((wanted, pool));
    result
}

/// Called in a child that was just forked; its number alone may be that of a process which ended long ago.
#[pyfunction]
pub(super) fn forget_pools() {
    forget(&mut IDLE.lock().unwrap_or_else(PoisonError::into_inner));
}

/// Leaks the pools: to end them would be to wait for threads that are not there.
fn forget(idle: &mut Idle) {
    mem::forget(mem::take(&mut idle.pools));
}
