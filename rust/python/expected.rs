//! Expected figures of a placement, and the cost of its pairs.

use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArray3, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3,
    PyUntypedArrayMethods,
};
use pyo3::prelude::*;

use super::{alone, array2, array3, detached, shaped, sizes};
use crate::arrays::count_groups;
use crate::division::divide;
use crate::replay::expected::{self, Expectation, Sets};

/// Slots [L,D,S], and the share of its expert's tokens that every slot serves.
type Slots<'py> = (PyReadonlyArray3<'py, i32>, PyReadonlyArray3<'py, f64>);

/// Least number of steps for which threads are worth waking.
const LARGE: usize = 1 << 18;

/// Runs `work` of so many steps: on other threads if there are many steps and more than one thread, otherwise in this one.
fn run<T: Send>(
    py: Python<'_>,
    steps: usize,
    threads: Option<usize>,
    work: impl FnOnce() -> T + Send,
) -> PyResult<T> {
    if steps < LARGE || threads == Some(1) { alone(py, work) } else { detached(py, threads, work) }
}

/// Runs `work` on the copies in the slots, as [`run`] does.
fn run_expected<T: Send>(
    py: Python<'_>,
    (slots, share): &Slots<'_>,
    experts: usize,
    (steps, threads): (usize, Option<usize>),
    work: impl FnOnce(&Expectation) -> T + Send,
) -> PyResult<T> {
    let (sizes, slots, share) = (sizes(slots.shape()), slots.as_slice()?, share.as_slice()?);
    let expectation = || Expectation::new(slots, share, sizes, experts);
    Ok(run(py, steps, threads, || expectation().map(|expectation| work(&expectation)))??)
}

/// Computes figures of devices [W,L,D] from loads of experts [W,L,E].
fn device_figures<'py>(
    py: Python<'py>,
    slots: &Slots<'_>,
    load: &PyReadonlyArray3<'_, f64>,
    threads: Option<usize>,
    work: fn(&Expectation, &[f64]) -> Vec<f64>,
) -> PyResult<Bound<'py, PyArray3<f64>>> {
    let ([windows, layers, experts], load) = (sizes(load.shape()), load.as_slice()?);
    let work = |expectation: &Expectation| work(expectation, load);
    let figures = run_expected(py, slots, experts, (load.len(), threads), work)?;
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
    device_figures(py, &slots, &load, threads, Expectation::load)
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
    let (shape, rate): ([usize; 3], _) = (sizes(slots.shape()), rate.as_slice()?);
    shaped("rate", &[rate.len()], &[shape[1]])?;
    shaped("slots", &[shape[0]], &[layers])?;
    let slots = slots.as_slice()?;
    let tokens = detached(py, threads, || divide(slots, shape, load, experts, rate))?;
    array3(py, (windows, layers, shape[1]), tokens)
}

#[pyfunction]
#[pyo3(signature = (slots, load, *, threads = None))]
pub(super) fn expected_active<'py>(
    py: Python<'py>,
    slots: Slots<'py>,
    load: PyReadonlyArray3<'py, f64>,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray3<f64>>> {
    device_figures(py, &slots, &load, threads, Expectation::active)
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
    let nodes = count_groups(&node_of_device);
    let slices = sets.iter().map(|(ids, counts)| {
        let top_k = ids.shape()[1].max(1);
        Ok(Sets { ids: ids.as_slice()?, top_k, counts: counts.as_slice()? })
    });
    let slices = slices.collect::<PyResult<Vec<_>>>()?;
    let steps = slices.iter().map(|slice| slice.ids.len()).sum();
    let work = |expectation: &Expectation| expectation.visits(&node_of_device, &slices, hashed);
    let (of_devices, of_nodes) = run_expected(py, &slots, num_experts, (steps, threads), work)?;
    let [layers, devices, _] = sizes(slots.0.shape());
    Ok((array2(py, (layers, devices), of_devices)?, array2(py, (layers, nodes), of_nodes)?))
}

#[pyfunction]
#[pyo3(signature = (slots, node_of_device, pairs, top_k, *, threads = None))]
pub(super) fn estimated_visits<'py>(
    py: Python<'py>,
    slots: Slots<'py>,
    node_of_device: Vec<u16>,
    pairs: PyReadonlyArray3<'py, u64>,
    top_k: Vec<u32>,
    threads: Option<usize>,
) -> PyResult<Visits<'py>> {
    let nodes = count_groups(&node_of_device);
    let [layers, devices, _] = sizes(slots.0.shape());
    let experts = pairs.shape()[2];
    shaped("pairs", pairs.shape(), &[layers, experts, experts])?;
    shaped("top_k", &[top_k.len()], &[layers])?;
    let pairs = pairs.as_slice()?;
    let work = |expectation: &Expectation| expectation.visits_of_pairs(&node_of_device, pairs, &top_k);
    let (of_devices, of_nodes) = run_expected(py, &slots, experts, (pairs.len(), threads), work)?;
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
    let work = |expectation: &Expectation| expectation.apart(pairs);
    Ok(run_expected(py, &slots, experts, (pairs.len(), threads), work)?.into_pyarray(py))
}

#[pyfunction]
#[pyo3(signature = (slots, transitions, *, threads = None))]
pub(super) fn expected_transitions<'py>(
    py: Python<'py>,
    slots: Slots<'py>,
    transitions: PyReadonlyArray3<'py, u64>,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray3<f64>>> {
    let ([boundaries, experts, _], devices) = (sizes(transitions.shape()), slots.0.shape()[1]);
    let counts = transitions.as_slice()?;
    let work = |expectation: &Expectation| expectation.transitions(counts);
    let pairs = run_expected(py, &slots, experts, (counts.len(), threads), work)?;
    array3(py, (boundaries, devices, devices), pairs)
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
    run(py, pairs.len(), threads, || expected::pair_cost(here, there, pairs, price, experts))
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
    let rows = run(py, steps, threads, || expected::busiest_rows(visits, share, tier, tiers))?;
    array3(py, (windows, layers, tiers), rows)
}
