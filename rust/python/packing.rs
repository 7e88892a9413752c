//! Packing of loads into clusters, and placement of clusters on devices.

use numpy::{PyArray2, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3, PyUntypedArrayMethods};
use pyo3::prelude::*;
use rayon::prelude::*;

use super::{array2, deadline, detached, watched};
use crate::control::Control;
use crate::error::Error;
use crate::packing::{self, ClusterSizes, Goal, Improve, smallest_peak};
use crate::two_stage::Chain;

/// Cluster of every expert [L,E]; peak and its bound, deviation times clusters and its bound, of every layer [L]; whether it
/// was interrupted.
type Packed<'py> = (Bound<'py, PyArray2<u16>>, Vec<(u128, u128, u128, u128)>, bool);

#[pyfunction]
#[pyo3(signature = (load, clusters, sizes, *, tolerance = None, time_limit = None, threads = None))]
pub(super) fn pack<'py>(
    py: Python<'py>,
    load: PyReadonlyArray2<'py, u64>,
    clusters: usize,
    sizes: (usize, usize),
    tolerance: Option<f64>,
    time_limit: Option<f64>,
    threads: Option<usize>,
) -> PyResult<Packed<'py>> {
    let ([layers, experts], load) = (super::sizes(load.shape()), load.as_slice()?);
    let sizes = ClusterSizes { smallest: sizes.0, largest: sizes.1 };
    let goal = tolerance.map_or(Goal::Peak, |tolerance| Goal::Deviation { tolerance });
    let control = Control::new(deadline(time_limit));
    let improve = Improve { goal, is_over: &|| control.stopped() };
    let work = || packing::pack(load, experts, clusters, sizes, Some(improve));
    let (packed, interrupted) = watched(py, threads, &control, None, work)?;
    let packed = packed?;
    let balance = packed.iter().map(|p| (p.peak.0, p.peak.1, p.deviation.0, p.deviation.1)).collect();
    let cluster = packed.into_iter().flat_map(|p| p.cluster).collect();
    Ok((array2(py, (layers, experts), cluster)?, balance, interrupted))
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
    let layers = load.as_slice()?.par_chunks(load.shape()[1].max(1)).zip(reached.as_slice()?);
    let peak = |(load, &reached): (&[u64], &u64)| smallest_peak(load, devices, slots, reached.into());
    Ok(detached(py, threads, || layers.map(peak).collect::<Result<_, Error>>())??)
}

/// Device of every cluster [L,D], the method, a lower bound on the bottleneck, and whether it was interrupted.
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
    let sizes = sizes.as_ref().map(|sizes| sizes.as_slice()).transpose()?;
    let start = start.as_ref().map(|start| start.as_slice()).transpose()?;
    let (traffic, cost) = (traffic.as_slice()?, cost.as_slice()?);
    let chain = Chain { traffic, cost, sizes, start, layers, devices };
    let control = Control::new(deadline(time_limit));
    let (placed, interrupted) = watched(py, threads, &control, None, || chain.place(&control))?;
    let method = if placed.exact { "exact: uniform links" } else { "heuristic: local search" };
    Ok((array2(py, (layers, devices), placed.device)?, method, placed.bound, interrupted))
}
