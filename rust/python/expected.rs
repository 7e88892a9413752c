//! What is expected of a placement, and what its pairs cost.

use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArray3, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3,
    PyUntypedArrayMethods,
};
use pyo3::prelude::*;

use super::{alone, array2, array3, contiguous, detached};
use crate::error::{Error, Result};
use crate::replay::expected::{Sets, Shared, busiest, cost, is_large};

/// Slots [L,D,S] and the shares that they serve of their experts' tokens.
type Slots<'py> = (PyReadonlyArray3<'py, i32>, PyReadonlyArray3<'py, f64>);

/// Makes `work` of what the slots share, on other threads.
fn shared<T: Send>(
    py: Python<'_>,
    (slots, share): &Slots<'_>,
    experts: usize,
    (steps, threads): (usize, Option<usize>),
    work: impl FnOnce(&Shared) -> Result<T> + Send,
) -> PyResult<T> {
    let &[layers, devices, per_device] = slots.shape() else {
        unreachable!("the array has three dimensions")
    };
    let (slots, share) = (contiguous(slots.as_slice().ok())?, contiguous(share.as_slice().ok())?);
    let make = || work(&Shared::new(slots, share, [layers, devices, per_device], experts)?);
    made(py, steps, threads, make)
}

/// Makes `work` of so many steps, on other threads where they are many.
fn made<T: Send>(
    py: Python<'_>,
    steps: usize,
    threads: Option<usize>,
    work: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    Ok(if is_large(steps) { detached(py, threads, work)?? } else { alone(py, work)?? })
}

#[pyfunction]
#[pyo3(signature = (slots, load, *, threads = None))]
pub(super) fn expected_load<'py>(
    py: Python<'py>,
    slots: Slots<'py>,
    load: PyReadonlyArray3<'py, f64>,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray3<f64>>> {
    let &[windows, layers, experts] = load.shape() else { unreachable!("the array has three dimensions") };
    if layers != slots.0.shape()[0] {
        let (rule, got) = (format!("{} layers", slots.0.shape()[0]), layers.to_string());
        return Err(Error::Shape { what: "load", rule, got }.into());
    }
    let devices = slots.0.shape()[1];
    let load = contiguous(load.as_slice().ok())?;
    let tokens = shared(py, &slots, experts, (load.len(), threads), |shared| shared.load(load))?;
    array3(py, (windows, layers, devices), tokens)
}

/// Tokens that visit devices [L,D] and nodes [L,N].
type Visits<'py> = (Bound<'py, PyArray2<f64>>, Bound<'py, PyArray2<f64>>);

#[pyfunction]
#[pyo3(signature = (slots, num_experts, node_of_device, sets, *, hashed, threads = None))]
pub(super) fn expected_visits<'py>(
    py: Python<'py>,
    slots: Slots<'py>,
    num_experts: usize,
    node_of_device: Vec<u16>,
    sets: Vec<(PyReadonlyArray2<'py, u16>, PyReadonlyArray1<'py, u64>)>,
    hashed: bool,
    threads: Option<usize>,
) -> PyResult<Visits<'py>> {
    let (layers, devices) = (slots.0.shape()[0], slots.0.shape()[1]);
    let nodes = node_of_device.iter().max().map_or(0, |&node| usize::from(node) + 1);
    let slices = sets
        .iter()
        .map(|(ids, counts)| {
            let (ids, counts) = (contiguous(ids.as_slice().ok())?, contiguous(counts.as_slice().ok())?);
            Ok(Sets { ids, counts })
        })
        .collect::<PyResult<Vec<_>>>()?;
    let steps = slices.iter().map(|of| of.ids.len()).sum();
    let work = |shared: &Shared| shared.visits(&node_of_device, &slices, hashed);
    let (of_devices, of_nodes) = shared(py, &slots, num_experts, (steps, threads), work)?;
    Ok((array2(py, (layers, devices), of_devices)?, array2(py, (layers, nodes), of_nodes)?))
}

#[pyfunction]
#[pyo3(signature = (slots, pairs, *, threads = None))]
pub(super) fn expected_apart<'py>(
    py: Python<'py>,
    slots: Slots<'py>,
    pairs: PyReadonlyArray3<'py, u64>,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let experts = pairs.shape()[2];
    let pairs = contiguous(pairs.as_slice().ok())?;
    Ok(shared(py, &slots, experts, (pairs.len(), threads), |shared| shared.apart(pairs))?.into_pyarray(py))
}

#[pyfunction]
#[pyo3(signature = (slots, transitions, *, threads = None))]
pub(super) fn expected_followed<'py>(
    py: Python<'py>,
    slots: Slots<'py>,
    transitions: PyReadonlyArray3<'py, u64>,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray3<f64>>> {
    let (boundaries, experts, devices) = (transitions.shape()[0], transitions.shape()[2], slots.0.shape()[1]);
    let transitions = contiguous(transitions.as_slice().ok())?;
    let followed =
        shared(py, &slots, experts, (transitions.len(), threads), |shared| shared.followed(transitions))?;
    array3(py, (boundaries, devices, devices), followed)
}

#[pyfunction]
#[pyo3(signature = (here, there, pairs, link_cost, *, threads = None))]
pub(super) fn pair_cost(
    py: Python<'_>,
    here: PyReadonlyArray2<'_, u16>,
    there: PyReadonlyArray2<'_, u16>,
    pairs: PyReadonlyArray3<'_, u64>,
    link_cost: PyReadonlyArray2<'_, u64>,
    threads: Option<usize>,
) -> PyResult<u128> {
    let experts = pairs.shape()[2];
    let (here, there) = (contiguous(here.as_slice().ok())?, contiguous(there.as_slice().ok())?);
    let (pairs, price) = (contiguous(pairs.as_slice().ok())?, contiguous(link_cost.as_slice().ok())?);
    made(py, pairs.len(), threads, || cost(here, there, pairs, price, experts))
}

#[pyfunction]
#[pyo3(signature = (visits, share, tier, tiers, *, threads = None))]
pub(super) fn busiest_rows<'py>(
    py: Python<'py>,
    visits: PyReadonlyArray3<'py, f64>,
    share: PyReadonlyArray3<'py, f64>,
    tier: PyReadonlyArray2<'py, u16>,
    tiers: usize,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray3<f64>>> {
    let (windows, layers) = (visits.shape()[0], visits.shape()[1]);
    let (visits, share) = (contiguous(visits.as_slice().ok())?, contiguous(share.as_slice().ok())?);
    let tier = contiguous(tier.as_slice().ok())?;
    let steps = visits.len().saturating_mul(tier.len().isqrt() * tiers);
    let rows = made(py, steps, threads, || busiest(visits, share, tier, tiers))?;
    array3(py, (windows, layers, tiers), rows)
}
