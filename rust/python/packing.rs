//! Loads packed into clusters, and clusters put on devices.

use numpy::{
    PyArray2, PyArray3, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use rayon::prelude::*;

use super::{alone, array2, array3, contiguous, deadline, detached, watched};
use crate::control::Control;
use crate::error::Error;
use crate::packing::{Goal, Improve, Packing, Sizes, smallest_peak};
use crate::two_stage::Chain;

/// Peak and its bound, deviation times clusters and its bound: one row per layer.
type Balance = Vec<(u128, u128, u128, u128)>;

/// Layers packed as well as time allows, and whether that was interrupted.
fn packed(
    py: Python<'_>,
    load: &PyReadonlyArray2<'_, u64>,
    devices: usize,
    sizes: Sizes,
    goal: Goal,
    time_limit: Option<f64>,
    threads: Option<usize>,
) -> PyResult<(Vec<Packing>, bool)> {
    let (experts, load) = (load.shape()[1], contiguous(load.as_slice().ok())?);
    let control = Control::new(deadline(time_limit));
    let work = || {
        let improve = Some(Improve { goal, is_over: &|| control.stopped() });
        crate::packing::pack(load, experts, devices, sizes, improve)
    };
    let (packed, interrupted) = watched(py, threads, &control, None, work)?;
    Ok((packed?, interrupted))
}

#[pyfunction]
#[pyo3(signature = (load, devices, slots, *, improve = false, time_limit = None, threads = None))]
pub(super) fn lpt<'py>(
    py: Python<'py>,
    load: PyReadonlyArray2<'py, u64>,
    devices: usize,
    slots: usize,
    improve: bool,
    time_limit: Option<f64>,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray3<i32>>> {
    let (layers, experts) = (load.shape()[0], load.shape()[1]);
    let sizes = Sizes { fewest: 0, most: slots };
    let cluster: Vec<u16> = if improve {
        let (packed, interrupted) = packed(py, &load, devices, sizes, Goal::Peak, time_limit, threads)?;
        if interrupted {
            return Err(PyKeyboardInterrupt::new_err(()));
        }
        packed.into_iter().flat_map(|packing| packing.cluster).collect()
    } else {
        let load = contiguous(load.as_slice().ok())?;
        alone(py, || crate::packing::pack_quickly(load, experts, devices, sizes))??
    };
    let mut filled = vec![-1; layers * devices * slots];
    let mut used = vec![0; devices];
    for (cluster, filled) in
        cluster.chunks(experts.max(1)).zip(filled.chunks_exact_mut((devices * slots).max(1)))
    {
        used.fill(0);
        for (&g, e) in cluster.iter().zip(0..) {
            let g = usize::from(g);
            filled[g * slots + used[g]] = e;
            used[g] += 1;
        }
    }
    array3(py, (layers, devices, slots), filled)
}

#[pyfunction]
#[pyo3(signature = (load, devices, slots, reached, *, threads = None))]
pub(super) fn smallest_peaks(
    py: Python<'_>,
    load: PyReadonlyArray2<'_, u64>,
    devices: usize,
    slots: usize,
    reached: PyReadonlyArray1<'_, u64>,
    threads: Option<usize>,
) -> PyResult<Vec<(u128, u128)>> {
    let experts = load.shape()[1].max(1);
    let (load, reached) = (contiguous(load.as_slice().ok())?, contiguous(reached.as_slice().ok())?);
    let layers = load.par_chunks(experts).zip(reached);
    let peak = |(load, &reached): (&[u64], &u64)| smallest_peak(load, devices, slots, reached.into());
    let peaks = detached(py, threads, || layers.map(peak).collect::<Result<_, Error>>())?;
    Ok(peaks?)
}

#[pyfunction]
#[pyo3(signature = (load, clusters, slots, *, equal_sizes = true, tolerance = 0.0, time_limit = None, threads = None))]
pub(super) fn cluster<'py>(
    py: Python<'py>,
    load: PyReadonlyArray2<'py, u64>,
    clusters: usize,
    slots: usize,
    equal_sizes: bool,
    tolerance: f64,
    time_limit: Option<f64>,
    threads: Option<usize>,
) -> PyResult<(Bound<'py, PyArray2<u16>>, Balance, bool)> {
    let (layers, experts) = (load.shape()[0], load.shape()[1]);
    let sizes = if equal_sizes && clusters > 0 {
        Sizes::equal(experts, clusters)
    } else {
        Sizes::free(experts, clusters, slots)
    };
    let goal = Goal::Deviation { tolerance };
    let (packed, interrupted) = packed(py, &load, clusters, sizes, goal, time_limit, threads)?;
    let balance = packed.iter().map(|p| (p.peak.0, p.peak.1, p.deviation.0, p.deviation.1)).collect();
    let cluster = packed.into_iter().flat_map(|p| p.cluster).collect();
    Ok((array2(py, (layers, experts), cluster)?, balance, interrupted))
}

/// The device of every cluster [L,D], how it was found, a lower bound of the bottleneck, whether it was interrupted.
type Placed<'py> = (Bound<'py, PyArray2<u16>>, &'static str, u128, bool);

#[pyfunction]
#[pyo3(signature = (traffic, cost, *, sizes = None, start = None, time_limit = None, threads = None))]
pub(super) fn place_clusters<'py>(
    py: Python<'py>,
    traffic: PyReadonlyArray3<'py, u64>,
    cost: PyReadonlyArray2<'py, u64>,
    sizes: Option<PyReadonlyArray2<'py, u64>>,
    start: Option<PyReadonlyArray2<'py, u16>>,
    time_limit: Option<f64>,
    threads: Option<usize>,
) -> PyResult<Placed<'py>> {
    let (layers, devices) = (traffic.shape()[0] + 1, cost.shape()[0]);
    let sizes = sizes.as_ref().map(|sizes| contiguous(sizes.as_slice().ok())).transpose()?;
    let start = start.as_ref().map(|start| contiguous(start.as_slice().ok())).transpose()?;
    let (traffic, cost) = (contiguous(traffic.as_slice().ok())?, contiguous(cost.as_slice().ok())?);
    let chain = Chain { traffic, cost, sizes, start, layers, devices };
    let control = Control::new(deadline(time_limit));
    let (placed, interrupted) = watched(py, threads, &control, None, || chain.place(&control))?;
    let way = if placed.exact { "exact: uniform links" } else { "heuristic: local search" };
    Ok((array2(py, (layers, devices), placed.device)?, way, placed.bound, interrupted))
}
