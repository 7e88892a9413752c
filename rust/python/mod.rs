//! The Python module `moetuner._core`: views in, one call, arrays out. Only this folder knows pyo3.

// Extracted arguments arrive by value; field names of classes are seen by nobody.
#![allow(clippy::needless_pass_by_value, clippy::struct_field_names)]

mod bounding;
mod counting;
mod layers;
mod packing;
mod solving;

use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use numpy::ndarray::{Array2, Array3};
use numpy::{IntoPyArray, PyArray2, PyArray3, PyReadonlyArray3};
use pyo3::exceptions::{PyKeyboardInterrupt, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::error::Error;
use crate::search::Control;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

fn contiguous<T>(slice: Option<&[T]>) -> PyResult<&[T]> {
    slice.ok_or_else(|| PyTypeError::new_err("array must be C-contiguous"))
}

fn thread_pool(threads: usize) -> PyResult<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1)).build();
    pool.map_err(|e| PyValueError::new_err(format!("threads: {e}")))
}

/// Runs `work` without the interpreter lock, in a pool of `threads` threads where a number is given.
fn detached<T: Send>(py: Python<'_>, threads: Option<usize>, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    py.detach(|| match threads {
        None => Ok(work()),
        Some(n) => Ok(thread_pool(n)?.install(work)),
    })
}

/// Runs long `work` on a thread of its own while this one looks for signals and reports progress.
///
/// An interrupt (Ctrl-C) sets `control.stop`; the work then ends soon with the best it has, and the second value is
/// true. An error raised by `progress` stops the work and is raised.
fn watched<T: Send>(
    py: Python<'_>,
    threads: Option<usize>,
    control: &Control,
    progress: Option<&Bound<'_, PyAny>>,
    work: impl FnOnce() -> T + Send,
) -> PyResult<(T, bool)> {
    let pool = threads.map(thread_pool).transpose()?;
    let begin = Instant::now();
    let mut interrupted = false;
    let mut failed = None;
    let result = std::thread::scope(|scope| {
        let (send, receive) = channel::<()>();
        let worker = scope.spawn(move || {
            // Dropped at the end of the work, also when it panics.
            let _done = send;
            match pool {
                Some(pool) => pool.install(work),
                None => work(),
            }
        });
        let mut reported = Duration::ZERO;
        let receive = std::sync::Mutex::new(receive);
        let wait = || {
            let receive = receive.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            receive.recv_timeout(Duration::from_millis(50)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
        };
        while py.detach(wait) {
            if py.check_signals().is_err() {
                interrupted = true;
                control.stop.store(true, Ordering::Relaxed);
            }
            let now = begin.elapsed();
            if let (Some(progress), true) = (progress, now >= reported + Duration::from_millis(200)) {
                reported = now;
                let best = control.best.load(Ordering::Relaxed);
                let best = (best != i64::MAX).then_some(best);
                if let Err(error) = progress.call1((now.as_secs_f64(), best)) {
                    control.stop.store(true, Ordering::Relaxed);
                    // Ctrl-C may well come while a report is being written.
                    if error.is_instance_of::<PyKeyboardInterrupt>(py) {
                        interrupted = true;
                    } else {
                        failed.get_or_insert(error);
                    }
                }
            }
        }
        py.detach(|| worker.join())
    });
    match (failed, result) {
        (Some(error), _) => Err(error),
        (None, Ok(result)) => Ok((result, interrupted)),
        (None, Err(_)) => {
            Err(PyRuntimeError::new_err("the native search panicked; please report this as a bug"))
        }
    }
}

/// A table as a slice, an empty one where there is none.
fn slice<'a, T: numpy::Element>(array: Option<&'a PyReadonlyArray3<'_, T>>) -> PyResult<&'a [T]> {
    array.map_or(Ok(&[]), |array| contiguous(array.as_slice().ok()))
}

fn array3<T: numpy::Element>(
    py: Python<'_>,
    shape: (usize, usize, usize),
    data: Vec<T>,
) -> PyResult<Bound<'_, PyArray3<T>>> {
    let array = Array3::from_shape_vec(shape, data).map_err(|e| PyValueError::new_err(e.to_string()))?;
    Ok(array.into_pyarray(py))
}

fn array2<T: numpy::Element>(
    py: Python<'_>,
    shape: (usize, usize),
    data: Vec<T>,
) -> PyResult<Bound<'_, PyArray2<T>>> {
    let array = Array2::from_shape_vec(shape, data).map_err(|e| PyValueError::new_err(e.to_string()))?;
    Ok(array.into_pyarray(py))
}

/// moetuner's native core.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::bounding::{bound, verify_bound};
    #[pymodule_export]
    use super::counting::{Replay, StatisticsCounter, merge_sets, validate};
    #[pymodule_export]
    use super::layers::{Layers, replicate_experts};
    #[pymodule_export]
    use super::packing::{cluster, lpt, place_clusters, smallest_peaks};
    #[pymodule_export]
    use super::solving::{exact_chain, search, separate};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
