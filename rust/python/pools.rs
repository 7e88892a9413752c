//! Pools of threads for calls: never rayon's global pool, that of a parent process, or that of another call at work.

use std::mem;
use std::num::NonZero;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// Largest number of idle pools.
const IDLE_POOLS: usize = 4;
/// Largest number of threads of a pool per core: more would only take memory.
const PER_CORE: usize = 4;

/// The idle pools of a process, by the number of threads that was asked for; 0 for all cores.
struct Idle {
    process: u32,
    pools: Vec<(usize, ThreadPool)>,
}

static IDLE: Mutex<Idle> = Mutex::new(Idle { process: 0, pools: Vec::new() });

/// Locks and returns the idle pools of this process.
///
/// A child that was forked has its parent's memory but not its threads: work that is given to the parent's pools would wait
/// forever. Only threads that are attached to the interpreter hold this lock. A thread that forks from Python is the only
/// attached one, by the interpreter's lock, or because a free-threaded interpreter stops all others first. So no child starts
/// with a locked mutex.
fn lock_idle(_: Python<'_>) -> MutexGuard<'static, Idle> {
    let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    if idle.process != std::process::id() {
        forget(&mut idle);
        idle.process = std::process::id();
    }
    idle
}

/// Runs `work` with a pool of so many threads that no other call uses; without a number it has one thread per core.
///
/// No pool has more than [`PER_CORE`] threads per core, whatever number is asked for: answers do not depend on it. Two calls
/// that shared a pool would wait for each other's work, beyond their time limits.
pub(super) fn with_pool<T>(
    py: Python<'_>,
    threads: Option<usize>,
    work: impl FnOnce(&ThreadPool) -> PyResult<T>,
) -> PyResult<T> {
    let largest = || std::thread::available_parallelism().map_or(1, NonZero::get) * PER_CORE;
    let wanted = threads.map_or(0, |threads| threads.clamp(1, largest()));
    let process = std::process::id();
    let idle_pool = {
        let mut idle = lock_idle(py);
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
        // A callback has forked, and this is the child.
        mem::forget(pool);
        return result;
    }
    let mut idle = lock_idle(py);
    if idle.pools.len() == IDLE_POOLS {
        idle.pools.remove(0);
    }
    idle.pools.push((wanted, pool));
    result
}

/// Forgets the parent's pools in a child that was just forked.
///
/// The child's process id alone does not suffice: it may be that of a process which ended long ago.
#[pyfunction]
pub(super) fn forget_pools() {
    forget(&mut IDLE.lock().unwrap_or_else(PoisonError::into_inner));
}

/// Leaks the pools: dropping them would wait for threads that do not exist.
fn forget(idle: &mut Idle) {
    mem::forget(mem::take(&mut idle.pools));
}
