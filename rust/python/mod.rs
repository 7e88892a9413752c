//! The Python module `moetuner._core`: views in, one call, arrays out. Only this folder knows pyo3.

// Extracted arguments arrive by value; nobody sees the field names of classes.
#![allow(clippy::needless_pass_by_value, clippy::struct_field_names)]

mod bounding;
mod chain;
mod counting;
mod expected;
mod layer;
mod lines;
mod packing;
mod pools;
mod processor;
mod rules;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use numpy::ndarray::{Array2, Array3};
use numpy::{IntoPyArray, PyArray2, PyArray3, PyReadonlyArray3};
use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::control::Control;
use crate::error::Error;
use pools::with_pool;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        match error {
            Error::Memory { .. } => PyMemoryError::new_err(error.to_string()),
            _ => PyValueError::new_err(error.to_string()),
        }
    }
}

/// Refuses an argument unless it has the expected shape.
fn shaped(what: &'static str, shape: &[usize], expected: &[usize]) -> PyResult<()> {
    let rule = || format!("shape {expected:?}");
    (shape == expected)
        .then_some(())
        .ok_or_else(|| Error::Shape { what, rule: rule(), got: format!("{shape:?}") }.into())
}

/// Place of the last panic; the panic itself carries its message.
static PANIC: Mutex<String> = Mutex::new(String::new());

/// Keeps panics from standard error: they become errors of Python, see [`caught`].
fn quiet_panics() {
    let loud = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if let (Some(place), Ok(mut last)) = (panic.location(), PANIC.try_lock()) {
            *last = place.to_string();
        }
        // With `RUST_BACKTRACE` the panic and its trace are printed, too.
        if std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0") {
            loud(panic);
        }
    }));
}

/// Runs `work`; a panic becomes a `RuntimeError` with its place and message.
fn caught<T>(work: impl FnOnce() -> T) -> PyResult<T> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        let place = PANIC.lock().unwrap_or_else(PoisonError::into_inner);
        PyRuntimeError::new_err(format!("the core panicked at {place}: {text}"))
    })
}

/// Runs `work` in this thread, without the interpreter lock; it must not be parallel.
fn alone<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    caught(|| py.detach(work))
}

/// Runs `work` without the interpreter lock, on `threads` threads where a number is given.
fn detached<T: Send>(py: Python<'_>, threads: Option<usize>, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    with_pool(py, threads, |pool| caught(|| py.detach(|| pool.install(work))))
}

/// Returns the end of a time limit in seconds from now; None without a limit, or if it is longer than clocks count.
fn deadline(time_limit: Option<f64>) -> Option<Instant> {
    let limit = Duration::try_from_secs_f64(time_limit?.max(0.0)).ok()?;
    Instant::now().checked_add(limit)
}

/// Runs long `work` on other threads while this one looks for signals and reports progress.
///
/// Progress is reported at once, so that listeners hear of short work, too, and then every 200 ms.
///
/// An interrupt (Ctrl-C) sets `control.cancelled`. The work then ends soon with the best answer so far, and the second value
/// is true. Any other error, of `progress` or of a signal handler (a timer's, say), stops the work and is raised.
fn watched<T: Send>(
    py: Python<'_>,
    threads: Option<usize>,
    control: &Control,
    progress: Option<&Bound<'_, PyAny>>,
    work: impl FnOnce() -> T + Send,
) -> PyResult<(T, bool)> {
    let begin = Instant::now();
    let mut interrupted = false;
    let mut failed = None;
    let mut result = None;
    let place = &mut result;
    let watch = |pool: &rayon::ThreadPool| {
        pool.in_place_scope(|scope| {
            let (send, receive) = channel::<()>();
            scope.spawn(move |_| {
                // The sender is dropped at the end of the work, also when it panics.
                let _done = send;
                *place = Some(work());
            });
            let mut due = Duration::ZERO;
            let receive = Mutex::new(receive);
            let wait = || {
                let receive = receive.lock().unwrap_or_else(PoisonError::into_inner);
                receive.recv_timeout(Duration::from_millis(50)) == Err(RecvTimeoutError::Timeout)
            };
            let mut end = |error: PyErr| {
                control.cancelled.store(true, Ordering::Relaxed);
                // Ctrl-C may come while progress is reported. All other errors are raised.
                if error.is_instance_of::<PyKeyboardInterrupt>(py) {
                    interrupted = true;
                } else {
                    failed.get_or_insert(error);
                }
            };
            loop {
                if let Err(error) = py.check_signals() {
                    end(error);
                }
                let now = begin.elapsed();
                // A callback that has raised is not called again, however long the work takes to stop.
                let is_due = now >= due && !control.cancelled.load(Ordering::Relaxed);
                if let (Some(progress), true) = (progress, is_due) {
                    due = now + Duration::from_millis(200);
                    let best = control.best.load(Ordering::Relaxed);
                    let best = (best != i64::MAX).then_some(best);
                    if let Err(error) = progress.call1((now.as_secs_f64(), best)) {
                        end(error);
                    }
                }
                if !py.detach(wait) {
                    break;
                }
            }
        });
    };
    with_pool(py, threads, |pool| caught(|| watch(pool)))?;
    match (failed, result) {
        (Some(error), _) => Err(error),
        (None, Some(result)) => Ok((result, interrupted)),
        (None, None) => Err(PyRuntimeError::new_err("the core gave no result")),
    }
}

/// Returns the sizes of an array with N dimensions.
fn sizes<const N: usize>(shape: &[usize]) -> [usize; N] {
    shape.try_into().expect("the array's type says how many dimensions it has")
}

/// Returns a table as a slice; an empty slice if there is none.
fn slice<'a, T: numpy::Element>(array: Option<&'a PyReadonlyArray3<'_, T>>) -> PyResult<&'a [T]> {
    array.map_or(Ok(&[]), |array| Ok(array.as_slice()?))
}

/// Returns an array of three dimensions with its numbers in C order.
fn array3<T: numpy::Element>(
    py: Python<'_>,
    shape: (usize, usize, usize),
    data: Vec<T>,
) -> PyResult<Bound<'_, PyArray3<T>>> {
    let array = Array3::from_shape_vec(shape, data).map_err(|e| PyValueError::new_err(e.to_string()))?;
    Ok(array.into_pyarray(py))
}

/// Returns an array of two dimensions with its numbers in C order.
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
    use pyo3::prelude::*;
    use pyo3::types::PyDict;

    #[pymodule_export]
    use super::bounding::{bound, bound_visits, verify_bound, verify_visits};
    #[pymodule_export]
    use super::chain::{exact_chain, search};
    #[pymodule_export]
    use super::counting::{
        Replay, Sides, StatisticsCounter, code_tokens, count_recency, merge_sets, validate,
    };
    #[pymodule_export]
    use super::expected::{
        balanced_load, busiest_rows, estimated_visits, expected_active, expected_apart, expected_load,
        expected_transitions, expected_visits, pair_cost,
    };
    #[pymodule_export]
    use super::layer::{
        Layers, adapt_slots, keep_slots, match_best, match_devices, measure_losses, replicate_experts,
        spend_budget,
    };
    #[pymodule_export]
    use super::lines::scan_lines;
    #[pymodule_export]
    use super::packing::{pack, place_clusters, smallest_peaks};
    #[pymodule_export]
    use super::pools::forget_pools;
    #[pymodule_export]
    use super::processor::instruction_sets;
    #[pymodule_export]
    use super::rules::{LayerRules, find_shortage};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::quiet_panics();
        // The hook takes keywords only, and not every system has it.
        let hooks = PyDict::new(module.py());
        hooks.set_item("after_in_child", module.getattr("forget_pools")?)?;
        let os = module.py().import("os")?;
        if os.hasattr("register_at_fork")? {
            os.call_method("register_at_fork", (), Some(&hooks))?;
        }
        Ok(())
    }
}
