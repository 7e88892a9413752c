//! Searches for placements of the chain of layers, and proven optima.

use std::sync::atomic::Ordering;

use numpy::{
    IntoPyArray, PyArray1, PyArray3, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;

use super::{array3, caught, deadline, sizes, slice, watched};
use crate::chain::instance::{Instance, Sizes};
use crate::chain::partitions::{MOST_EXPERTS, optimum};
use crate::control::Control;

/// Load [L,E], caps [L], cost of links [D,D], slots of a device, transitions [L-1,E,E] and co-activation [L,E,E].
type Problem<'py> = (
    PyReadonlyArray2<'py, u64>,
    PyReadonlyArray1<'py, u64>,
    PyReadonlyArray2<'py, i64>,
    usize,
    Option<PyReadonlyArray3<'py, u64>>,
    Option<PyReadonlyArray3<'py, u64>>,
);

/// Builds the instance of a problem.
fn build_instance(problem: &Problem<'_>) -> PyResult<Instance> {
    let (load, cap, cost, per_device, transitions, coactivation) = problem;
    let ([layers, experts], devices) = (sizes(load.shape()), cost.shape()[0]);
    let sizes = Sizes { layers, experts, devices, per_device: *per_device };
    let (load, cap, cost) = (load.as_slice()?, cap.as_slice()?, cost.as_slice()?);
    let (transitions, coactivation) = (slice(transitions.as_ref())?, slice(coactivation.as_ref())?);
    Ok(caught(|| Instance::new(sizes, load, transitions, coactivation, cap, cost))??)
}

/// Returns slots [L,D,S] with -1 in empty ones, from the expert or placeholder in every slot [L,P].
fn slots_array<'py>(py: Python<'py>, sizes: Sizes, placed: &[u16]) -> PyResult<Bound<'py, PyArray3<i32>>> {
    array3(py, (sizes.layers, sizes.devices, sizes.per_device), sizes.without_placeholders(placed))
}

/// Slots [L,D,S], number of trials, whether it was interrupted, and bits cut from every count.
type Searched<'py> = (Bound<'py, PyArray3<i32>>, u64, bool, u32);

#[pyfunction]
#[pyo3(signature = (problem, *, seed = 0, trials = None, time_limit = None, threads = None, progress = None))]
pub(super) fn search<'py>(
    py: Python<'py>,
    problem: Problem<'py>,
    seed: u64,
    trials: Option<u64>,
    time_limit: Option<f64>,
    threads: Option<usize>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Searched<'py>> {
    let mut instance = build_instance(&problem)?;
    let control = Control::new(deadline(time_limit));
    let work = || crate::chain::search(&mut instance, seed, trials, &control);
    let (placed, interrupted) = watched(py, threads, &control, progress.as_ref(), work)?;
    let trials = control.trials.load(Ordering::Relaxed);
    Ok((slots_array(py, instance.sizes, &placed?)?, trials, interrupted, instance.shift))
}

/// Slots [L,D,S], cost, and the caps that they keep [L].
type Optimal<'py> = (Bound<'py, PyArray3<i32>>, i64, Bound<'py, PyArray1<u64>>);

#[pyfunction]
#[pyo3(signature = (problem, *, work, time_limit = None, threads = None))]
pub(super) fn exact_chain<'py>(
    py: Python<'py>,
    problem: Problem<'py>,
    work: u64,
    time_limit: Option<f64>,
    threads: Option<usize>,
) -> PyResult<Option<Optimal<'py>>> {
    if problem.0.shape()[1] > MOST_EXPERTS {
        return Ok(None);
    }
    let instance = build_instance(&problem)?;
    let control = Control::new(deadline(time_limit));
    let search = || optimum(&instance, work, &control);
    let (placed, interrupted) = watched(py, threads, &control, None, search)?;
    if interrupted {
        return Err(PyKeyboardInterrupt::new_err(()));
    }
    let Some(placed) = placed else { return Ok(None) };
    let slots = slots_array(py, instance.sizes, &placed.expert_in)?;
    Ok(Some((slots, placed.cost, placed.cap.into_pyarray(py))))
}
