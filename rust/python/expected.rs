//! What is expected of a placement, and what its pairs cost.

use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArray3, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3,
    PyUntypedArrayMethods,
};
use pyo3::prelude::*;

use super::{alone, array2, array3, detached, shaped, sizes};
use crate::division::serve;
use crate::replay::expected::{Sets, Shared, busiest, cost};

/// Slots [L,D,S] and the shares that they serve of their experts' tokens.
type Slots<'py> = (PyReadonlyArray3<'py, i32>, PyReadonlyArray3<'py, f64>);

/// Steps from which threads are worth waking.
const LARGE: usize = 1 << 18;

/// Makes `work` of so many steps, on other threads where they are many and more than one may be used.
fn made<T: Send>(
    py: Python<'_>,
    steps: usize,
    threads: Option<usize>,
    work: impl FnOnce() -> T + Send,
) -> PyResult<T> {
    if steps < LARGE || threads == Some(1) { alone(py, work) } else { detached(py, threads, work) }
}

/// Makes `work` of what the slots share.
fn shared<T: Send>(
    py: Python<'_>,
    (slots, share): &Slots<'_>,
    experts: usize,
    (steps, threads): (usize, Option<usize>),
    work: impl FnOnce(&Shared) -> T + Send,
) -> PyResult<T> {
    let (sizes, slots, share) = (sizes(slots.shape()), slots.as_slice()?, share.as_slice()?);
    Ok(made(py, steps, threads, || Shared::new(slots, share, sizes, experts).map(|shared| work(&shared)))??)
}

/// Makes figures of devices [W,L,D] of loads of experts [W,L,E].
fn of_devices<'py>(
    py: Python<'py>,
    slots: &Slots<'_>,
    load: &PyReadonlyArray3<'_, f64>,
    threads: Option<usize>,
    work: fn(&Shared, &[f64]) -> Vec<f64>,
) -> PyResult<Bound<'py, PyArray3<f64>>> {
    let ([windows, layers, experts], load) = (sizes(load.shape()), load.as_slice()?);
    let figures = shared(py, slots, experts, (load.len(), threads), |shared| work(shared, load))?;
    array3(py, (windows, layers, slots.0.shape()[1]), figures)
}

#[pyfunction]
#[pyo3(signature = (slots, load, *, threads = None))]
pub(super) fn expected_load<'py>(
    py: Python<'py>,
    slots: Slots<'py>,
    load: PyReadonlyArray3<'py, f64>,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray3<f64>>> {
    of_devices(py, &slots, &load, threads, Shared::load)
}

#[pyfunction]
#[pyo3(signature = (slots, load, rate, *, threads = None))]
pub(super) fn balanced_load<'py>(
    py: Python<'py>,
    slots: PyReadonlyArray3<'py, i32>,
    load: PyReadonlyArray3<'py, f64>,
    rate: PyReadonlyArray1<'py, f64>,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray3<f64>>> {
    let ([windows, layers, experts], load) = (sizes(load.shape()), load.as_slice()?);
    let (places, rate) = (sizes(slots.shape()), rate.as_slice()?);
    shaped("rate", &[rate.len()], &[places[1]])?;
    shaped("slots", &[places[0]], &[layers])?;
    let slots = slots.as_slice()?;
    let tokens = detached(py, threads, || serve(slots, places, load, experts, rate))?;
    array3(py, (windows, layers, places[1]), tokens)
}

#[pyfunction]
#[pyo3(signature = (slots, load, *, threads = None))]
pub(super) fn expected_active<'py>(
    py: Python<'py>,
    slots: Slots<'py>,
    load: PyReadonlyArray3<'py, f64>,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray3<f64>>> {
    of_devices(py, &slots, &load, threads, Shared::active)
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
    let nodes = node_of_device.iter().max().map_or(0, |&node| usize::from(node) + 1);
    let slices =
        sets.iter().map(|(ids, counts)| Ok(Sets { ids: ids.as_slice()?, counts: counts.as_slice()? }));
    let slices = slices.collect::<PyResult<Vec<_>>>()?;
    let steps = slices.iter().map(|slice| slice.ids.len()).sum();
    let work = |shared: &Shared| shared.visits(&node_of_device, &slices, hashed);
    let (of_devices, of_nodes) = shared(py, &slots, num_experts, (steps, threads), work)?;
    let [layers, devices, _] = sizes(slots.0.shape());
    Ok((array2(py, (layers, devices), of_devices)?, array2(py, (layers, nodes), of_nodes)?))
}

#[pyfunction]
#[pyo3(signature = (slots, node_of_device, pairs, top_k, *, threads = None))]
pub(super) fn estimated_met<'py>(
    py: Python<'py>,
    slots: Slots<'py>,
    node_of_device: Vec<u16>,
    pairs: PyReadonlyArray3<'py, u64>,
    top_k: Vec<u32>,
    threads: Option<usize>,
) -> PyResult<Visits<'py>> {
    let nodes = node_of_device.iter().max().map_or(0, |&node| usize::from(node) + 1);
    let [layers, devices, _] = sizes(slots.0.shape());
    let experts = pairs.shape()[2];
    shaped("pairs", pairs.shape(), &[layers, experts, experts])?;
    shaped("top_k", &[top_k.len()], &[layers])?;
    let pairs = pairs.as_slice()?;
    let work = |shared: &Shared| shared.met(&node_of_device, pairs, &top_k);
    let (of_devices, of_nodes) = shared(py, &slots, experts, (pairs.len(), threads), work)?;
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
    let (experts, pairs) = (pairs.shape()[2], pairs.as_slice()?);
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
    let ([boundaries, experts, _], devices) = (sizes(transitions.shape()), slots.0.shape()[1]);
    let pairs = transitions.as_slice()?;
    let followed = shared(py, &slots, experts, (pairs.len(), threads), |shared| shared.followed(pairs))?;
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
    let (experts, pairs, price) = (pairs.shape()[2], pairs.as_slice()?, link_cost.as_slice()?);
    let (here, there) = (here.as_slice()?, there.as_slice()?);
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
    let [windows, layers, devices] = sizes(visits.shape());
    let (visits, share, tier) = (visits.as_slice()?, share.as_slice()?, tier.as_slice()?);
    let steps = visits.len().saturating_mul(devices * tiers);
    let rows = made(py, steps, threads, || busiest(visits, share, tier, tiers))?;
    array3(py, (windows, layers, tiers), rows)
}
