//! Placements of the chain of layers, searched or proven optimal.

use std::sync::atomic::Ordering;

use numpy::{
    IntoPyArray, PyArray1, PyArray3, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;

use super::{array3, caught, contiguous, deadline, slice, watched};
use crate::chain::instance::{Instance, Sizes};
use crate::chain::partitions::{MOST_EXPERTS, optimum};
use crate::chain::{Options, balanced, search as run_search};
use crate::control::Control;
use crate::error::Error;

/// The problem of placing experts, from arrays: load [L,E], cap [L], cost [D,D], transitions and co-activation.
fn instance_of(
    load: &PyReadonlyArray2<'_, u64>,
    cap: &PyReadonlyArray1<'_, u64>,
    cost: &PyReadonlyArray2<'_, i64>,
    per_device: usize,
    [transitions, coactivation]: [Option<&PyReadonlyArray3<'_, u64>>; 2],
) -> PyResult<Instance> {
    let sizes = sizes_of(load, cost, per_device);
    let (transitions, coactivation) = (slice(transitions)?, slice(coactivation)?);
    let load = contiguous(load.as_slice().ok())?;
    let (cap, cost) = (contiguous(cap.as_slice().ok())?, contiguous(cost.as_slice().ok())?);
    Ok(caught(|| Instance::new(sizes, load, transitions, coactivation, cap, cost))??)
}

fn sizes_of(load: &PyReadonlyArray2<'_, u64>, cost: &PyReadonlyArray2<'_, i64>, per_device: usize) -> Sizes {
    Sizes { layers: load.shape()[0], experts: load.shape()[1], devices: cost.shape()[0], per_device }
}

/// Slots [L,D,S], trials made, whether it was interrupted, bits cut from the counts.
type Searched<'py> = (Bound<'py, PyArray3<i32>>, u64, bool, u32);

#[pyfunction]
#[pyo3(signature = (load, cap, cost, slots_per_device, *, transitions = None, coactivation = None, seed = 0,
                    trials = None, time_limit = None, threads = None, progress = None))]
pub(super) fn search<'py>(
    py: Python<'py>,
    load: PyReadonlyArray2<'py, u64>,
    cap: PyReadonlyArray1<'py, u64>,
    cost: PyReadonlyArray2<'py, i64>,
    slots_per_device: usize,
    transitions: Option<PyReadonlyArray3<'py, u64>>,
    coactivation: Option<PyReadonlyArray3<'py, u64>>,
    seed: u64,
    trials: Option<u64>,
    time_limit: Option<f64>,
    threads: Option<usize>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Searched<'py>> {
    let pairs = [transitions.as_ref(), coactivation.as_ref()];
    let mut instance = instance_of(&load, &cap, &cost, slots_per_device, pairs)?;
    let sizes = instance.sizes;
    let control = Control::new(deadline(time_limit));
    let options = Options { seed, trials };
    let work = || -> Result<_, Error> {
        // Where no placement under the cap is known the most balanced one is what can be kept.
        let balanced = balanced(&instance, &control)?;
        instance.allow(&balanced);
        Ok(run_search(&instance, &options, &balanced, &control))
    };
    let (placed, interrupted) = watched(py, threads, &control, progress.as_ref(), work)?;
    let placed = placed?;
    let shape = (sizes.layers, sizes.devices, slots_per_device);
    let trials = control.trials.load(Ordering::Relaxed);
    Ok((array3(py, shape, sizes.unfill(&placed))?, trials, interrupted, instance.shift))
}

/// Slots [L,D,S], cost, the caps kept [L].
type Optimal<'py> = (Bound<'py, PyArray3<i32>>, i64, Bound<'py, PyArray1<u64>>);

#[pyfunction]
#[pyo3(signature = (load, cap, cost, slots_per_device, *, transitions = None, coactivation = None, work, time_limit = None, threads = None))]
pub(super) fn exact_chain<'py>(
    py: Python<'py>,
    load: PyReadonlyArray2<'py, u64>,
    cap: PyReadonlyArray1<'py, u64>,
    cost: PyReadonlyArray2<'py, i64>,
    slots_per_device: usize,
    transitions: Option<PyReadonlyArray3<'py, u64>>,
    coactivation: Option<PyReadonlyArray3<'py, u64>>,
    work: u64,
    time_limit: Option<f64>,
    threads: Option<usize>,
) -> PyResult<Option<Optimal<'py>>> {
    let pairs = [transitions.as_ref(), coactivation.as_ref()];
    let sizes = sizes_of(&load, &cost, slots_per_device);
    if sizes.experts > MOST_EXPERTS {
        return Ok(None);
    }
    let instance = instance_of(&load, &cap, &cost, slots_per_device, pairs)?;
    let control = Control::new(deadline(time_limit));
    let search = || optimum(&instance, work, &control);
    let (placed, interrupted) = watched(py, threads, &control, None, search)?;
    if interrupted {
        return Err(PyKeyboardInterrupt::new_err(()));
    }
    let Some(placed) = placed else { return Ok(None) };
    let shape = (sizes.layers, sizes.devices, slots_per_device);
    let slots = array3(py, shape, sizes.unfill(&placed.expert_in))?;
    Ok(Some((slots, placed.cost, placed.cap.into_pyarray(py))))
}
