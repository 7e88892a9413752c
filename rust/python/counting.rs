//! Checks, counts and replays of traces.

use std::num::NonZeroU64;

use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArray3, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2,
    PyReadonlyArray3, PyReadwriteArray3, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::{alone, array2, array3, caught, detached, shaped, sizes};
use crate::counting::recency::count;
use crate::counting::sets::merge_rows;
use crate::counting::windows::{Narrow, of_any_type};
use crate::counting::{Counter, Tables};
use crate::error::{Error, room_for};
use crate::replay::sides::Cells;
use crate::replay::{Copies, Labels, Split, Wanted};
use crate::trace::Routing;

/// Expert ids as numpy passes them.
#[derive(FromPyObject)]
pub(super) enum Ids<'py> {
    U8(PyReadonlyArray3<'py, u8>),
    U16(PyReadonlyArray3<'py, u16>),
}

impl Ids<'_> {
    /// Returns the shape of the ids.
    fn shape(&self) -> &[usize] {
        match self {
            Ids::U8(array) => array.shape(),
            Ids::U16(array) => array.shape(),
        }
    }

    /// Refuses a shard whose shape is that of another model.
    fn check(&self, routing: Routing) -> Result<(), Error> {
        let Routing { layers, top_k, .. } = routing;
        let rule = || format!("shape [tokens, {layers}, {top_k}]");
        let wrong = || Error::shape("expert_ids", rule(), &format!("{:?}", self.shape()));
        (self.shape()[1..] == [layers, top_k]).then_some(()).ok_or_else(wrong)
    }
}

/// Runs `$body` with `$ids` as a slice, whatever its integer type is.
macro_rules! with_ids {
    ($ids:expr, $slice:ident => $body:expr) => {
        match &$ids {
            Ids::U8(array) => {
                let $slice = array.as_slice()?;
                $body
            }
            Ids::U16(array) => {
                let $slice = array.as_slice()?;
                $body
            }
        }
    };
}

#[pyfunction]
#[pyo3(signature = (expert_ids, num_experts, first_token = 0, threads = None))]
pub(super) fn validate(
    py: Python<'_>,
    expert_ids: Ids<'_>,
    num_experts: usize,
    first_token: u64,
    threads: Option<usize>,
) -> PyResult<()> {
    let [_, layers, top_k] = sizes(expert_ids.shape());
    let routing = Routing::new(layers, num_experts, top_k)?;
    with_ids!(expert_ids, ids => Ok(detached(py, threads, || crate::trace::validate(ids, routing, first_token))??))
}

#[pyfunction]
pub(super) fn code_tokens<'py>(
    py: Python<'py>,
    expert_ids: Ids<'py>,
    table: PyReadonlyArray2<'py, u64>,
) -> PyResult<Bound<'py, PyArray1<u64>>> {
    let ([_, layers, top_k], [rows, experts]) = (sizes(expert_ids.shape()), sizes(table.shape()));
    let routing = Routing::new(layers, experts, top_k)?;
    if rows != layers {
        return Err(Error::shape("table", format!("a row for each of {layers} layers"), &rows).into());
    }
    let table = table.as_slice()?;
    let codes = with_ids!(expert_ids, ids => detached(py, None, || crate::trace::code(ids, routing, table))?);
    Ok(codes.into_pyarray(py))
}

/// Experts by their last use after a shard, and the number of uses of every place [L,E].
type Recency<'py> = (Bound<'py, PyArray2<u16>>, Bound<'py, PyArray2<u64>>);

#[pyfunction]
#[pyo3(signature = (expert_ids, orders, threads = None))]
pub(super) fn count_recency<'py>(
    py: Python<'py>,
    expert_ids: Ids<'py>,
    orders: PyReadonlyArray2<'py, u16>,
    threads: Option<usize>,
) -> PyResult<Recency<'py>> {
    let ([_, layers, top_k], [rows, experts]) = (sizes(expert_ids.shape()), sizes(orders.shape()));
    let routing = Routing::new(layers, experts, top_k)?;
    if rows != layers {
        return Err(Error::shape("orders", format!("a row for each of {layers} layers"), &rows).into());
    }
    let (mut orders, mut counts) = (orders.as_slice()?.to_vec(), vec![0; layers * experts]);
    with_ids!(expert_ids, ids => detached(py, threads, || count(ids, routing, &mut orders, &mut counts))?);
    Ok((array2(py, (layers, experts), orders)?, array2(py, (layers, experts), counts)?))
}

/// Counts a trace shard by shard.
#[pyclass(module = "moetuner._core")]
pub(super) struct StatisticsCounter {
    routing: Routing,
    counter: Option<Counter>,
    // numpy allocates the tables: it asks for huge pages, which halves the time of wide tables.
    transitions: Option<Py<PyArray3<u64>>>,
    coactivation: Option<Py<PyArray3<u64>>>,
}

/// Distinct expert sets [N,K] and their counts [N].
type SetArrays<'py> = (Bound<'py, PyArray2<u16>>, Bound<'py, PyArray1<u64>>);

/// Tokens, load [W,L,E], transitions [L-1,E,E], coactivation [L,E,E], sets of every layer.
type Counts<'py> = (
    u64,
    Bound<'py, PyAny>,
    Option<Py<PyArray3<u64>>>,
    Option<Py<PyArray3<u64>>>,
    Option<Vec<SetArrays<'py>>>,
);

/// Returns counts as an array of their own type.
fn narrow_array3(py: Python<'_>, shape: (usize, usize, usize), counts: Narrow) -> PyResult<Bound<'_, PyAny>> {
    of_any_type!(counts, counts => Ok(array3(py, shape, counts)?.into_any()))
}

/// Returns distinct sets and their counts as arrays.
fn set_arrays(py: Python<'_>, top_k: usize, sets: (Vec<u16>, Vec<u64>)) -> PyResult<SetArrays<'_>> {
    let (ids, counts) = sets;
    Ok((array2(py, (counts.len(), top_k), ids)?, counts.into_pyarray(py)))
}

#[pyfunction]
pub(super) fn merge_sets<'py>(
    py: Python<'py>,
    ids: PyReadonlyArray2<'py, u16>,
    counts: PyReadonlyArray1<'py, u64>,
) -> PyResult<SetArrays<'py>> {
    let (top_k, ids, counts) = (ids.shape()[1], ids.as_slice()?, counts.as_slice()?);
    let merged = alone(py, || {
        let rows = || ids.chunks_exact(top_k);
        if rows().is_sorted_by(|one, next| one < next) && rows().all(<[u16]>::is_sorted) {
            return (ids.to_vec(), counts.to_vec());
        }
        merge_rows(ids, counts, top_k)
    })?;
    set_arrays(py, top_k, merged)
}

#[pymethods]
impl StatisticsCounter {
    #[new]
    #[pyo3(signature = (layers, num_experts, top_k, *, window = None, transitions = true, coactivation = true,
                        sets = false, every = 1))]
    fn new(
        py: Python<'_>,
        layers: usize,
        num_experts: usize,
        top_k: usize,
        window: Option<NonZeroU64>,
        transitions: bool,
        coactivation: bool,
        sets: bool,
        every: u64,
    ) -> PyResult<Self> {
        let routing = Routing::new(layers, num_experts, top_k)?;
        let table = |wanted: bool, n: usize| -> PyResult<Option<Py<PyArray3<u64>>>> {
            if !wanted {
                return Ok(None);
            }
            room_for("tables", &[n, num_experts, num_experts, size_of::<u64>()])?;
            // The counter writes the table before it reads it, so that zeros are not needed.
            let table = py.import("numpy")?.call_method1("empty", ((n, num_experts, num_experts), "u8"))?;
            Ok(Some(table.cast_into::<PyArray3<u64>>()?.unbind()))
        };
        Ok(Self {
            routing,
            counter: Some(Counter::new(routing, window.map(NonZeroU64::get), sets.then_some(every.max(1)))),
            transitions: table(transitions, layers - 1)?,
            coactivation: table(coactivation, layers)?,
        })
    }

    #[pyo3(signature = (expert_ids, threads = None, *, checked = false))]
    fn push(
        &mut self,
        py: Python<'_>,
        expert_ids: Ids<'_>,
        threads: Option<usize>,
        checked: bool,
    ) -> PyResult<()> {
        expert_ids.check(self.routing)?;
        let counter = self.counter.as_mut().ok_or_else(finished)?;
        let lend = |table: &Option<Py<PyArray3<u64>>>| table.as_ref().map(|table| table.bind(py).readwrite());
        let (mut transitions, mut coactivation) = (lend(&self.transitions), lend(&self.coactivation));
        let mut tables = Tables {
            transitions: transitions.as_mut().map(|table| table.as_slice_mut()).transpose()?,
            coactivation: coactivation.as_mut().map(|table| table.as_slice_mut()).transpose()?,
        };
        with_ids!(expert_ids, ids => Ok(detached(py, threads, || counter.push(ids, &mut tables, checked))??))
    }

    #[pyo3(signature = (threads = None))]
    fn finish<'py>(&mut self, py: Python<'py>, threads: Option<usize>) -> PyResult<Counts<'py>> {
        let counter = self.counter.take().ok_or_else(finished)?;
        let Routing { layers, experts, top_k } = self.routing;
        let (counted, sets) = detached(py, threads, || {
            let mut counted = counter.finish();
            let sets = std::mem::take(&mut counted.sets);
            (counted, sets)
        })?;
        let sets = sets.into_iter().map(|sets| set_arrays(py, top_k, sets)).collect::<PyResult<Vec<_>>>()?;
        if counted.tokens == 0 {
            for table in [&self.transitions, &self.coactivation].into_iter().flatten() {
                table.bind(py).readwrite().as_slice_mut()?.fill(0);
            }
        }
        if let Some(coactivation) = &self.coactivation {
            let mut tables = coactivation.bind(py).readwrite();
            for table in tables.as_slice_mut()?.chunks_exact_mut(experts * experts) {
                // The diagonal counts load, not co-activation.
                for count in table.iter_mut().step_by(experts + 1) {
                    *count = 0;
                }
            }
        }
        let load = narrow_array3(py, (counted.windows, layers, experts), counted.load)?;
        let sets = (!sets.is_empty()).then_some(sets);
        Ok((counted.tokens, load, self.transitions.take(), self.coactivation.take(), sets))
    }
}

/// Builds the routing and the copies of slots [L,D,S], with the node of every device [D] and the name of a split.
fn build_copies(
    slots: &PyReadonlyArray3<'_, i32>,
    num_experts: usize,
    top_k: usize,
    node_of_device: &[u16],
    split: &str,
) -> PyResult<(Routing, Copies)> {
    let [layers, _, per_device] = sizes(slots.shape());
    let routing = Routing::new(layers, num_experts, top_k)?;
    let split = match split {
        "even" => Split::Even,
        "nearest" => Split::Nearest,
        "round_robin" => Split::RoundRobin,
        _ => {
            let rule = "must be 'even', 'nearest' or 'round_robin'";
            return Err(PyValueError::new_err(format!("split {rule}, got '{split}'")));
        }
    };
    let slots = slots.as_slice()?;
    Ok((routing, caught(|| Copies::new(slots, routing, per_device, node_of_device, split))??))
}

/// Replays tokens under a placement, shard by shard; every token has a label with the row that it counts in.
#[pyclass(module = "moetuner._core")]
pub(super) struct Replay {
    routing: Routing,
    sizes: [usize; 4],
    rows: usize,
    replay: Option<crate::replay::Replay>,
}

/// Load [R,L,D], visits [R,L,D], node visits [R,L,N], load of slots [R,L,P], traffic [L-1,D,D], pairs on one device [R].
type Tallied<'py> = (
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyArray3<u64>>,
    Bound<'py, PyArray1<u64>>,
);

#[pymethods]
impl Replay {
    #[new]
    #[pyo3(signature = (slots, num_experts, top_k, node_of_device, *, rows, most_tokens, split = "even",
                        visits = true, pairs = false, stays = false, of_slots = false))]
    #[allow(clippy::fn_params_excessive_bools)] // Python gives them by name.
    fn new(
        slots: PyReadonlyArray3<'_, i32>,
        num_experts: usize,
        top_k: usize,
        node_of_device: Vec<u16>,
        rows: usize,
        most_tokens: u64,
        split: &str,
        visits: bool,
        pairs: bool,
        stays: bool,
        of_slots: bool,
    ) -> PyResult<Self> {
        let (routing, copies) = build_copies(&slots, num_experts, top_k, &node_of_device, split)?;
        let wanted = Wanted { visits: visits || of_slots, pairs, stays, slots: of_slots };
        let (devices, nodes) = if wanted.visits { (copies.devices, copies.nodes()) } else { (0, 0) };
        let slots = if of_slots { slots.as_slice()?.len() / routing.layers } else { 0 };
        let sizes = [copies.devices, devices, nodes, slots];
        let replay = Some(crate::replay::Replay::new(routing, copies, rows, most_tokens, wanted)?);
        Ok(Self { routing, sizes, rows, replay })
    }

    #[pyo3(signature = (expert_ids, rows, threads = None, *, positions = None, homes = None,
                        checked = false))]
    fn push(
        &mut self,
        py: Python<'_>,
        expert_ids: Ids<'_>,
        rows: PyReadonlyArray1<'_, u32>,
        threads: Option<usize>,
        positions: Option<PyReadonlyArray1<'_, u64>>,
        homes: Option<PyReadonlyArray1<'_, u16>>,
        checked: bool,
    ) -> PyResult<()> {
        expert_ids.check(self.routing)?;
        let position = positions.as_ref().map(|numbers| numbers.as_slice()).transpose()?;
        let home = homes.as_ref().map(|numbers| numbers.as_slice()).transpose()?;
        let labels = Labels { row: rows.as_slice()?, position, home };
        let replay = self.replay.as_mut().ok_or_else(finished)?;
        with_ids!(expert_ids, ids => Ok(detached(py, threads, || replay.push(ids, labels, checked))??))
    }

    fn finish<'py>(&mut self, py: Python<'py>) -> PyResult<Tallied<'py>> {
        let replay = self.replay.take().ok_or_else(finished)?;
        let tally = alone(py, || replay.finish())?;
        let (layers, [devices, visited, nodes, slots]) = (self.routing.layers, self.sizes);
        let table = |counts, size| narrow_array3(py, (self.rows, layers, size), counts);
        let between = if tally.traffic.is_empty() { 0 } else { layers - 1 };
        Ok((
            table(tally.load, devices)?,
            table(tally.visits, visited)?,
            table(tally.node_visits, nodes)?,
            table(tally.slots, slots)?,
            array3(py, (between, devices, devices), tally.traffic)?,
            tally.stays.into_pyarray(py),
        ))
    }
}

/// Counts of windows for sides, which are unions of folds, added up from the counts of their folds.
#[pyclass(module = "moetuner._core")]
pub(super) struct Sides {
    sides: crate::replay::sides::Sides,
    shape: (usize, usize),
}

/// Window [R], tokens [R] and length [R] of every row; row of every window and side [W,S].
type SideRows<'py> = (
    Bound<'py, PyArray1<u32>>,
    Bound<'py, PyArray1<u64>>,
    Bound<'py, PyArray1<u64>>,
    Bound<'py, PyArray2<u32>>,
);

/// Counts as numpy passes them.
#[derive(FromPyObject)]
enum CellCounts<'py> {
    U8(PyReadonlyArray3<'py, u8>),
    U16(PyReadonlyArray3<'py, u16>),
    U32(PyReadonlyArray3<'py, u32>),
    U64(PyReadonlyArray3<'py, u64>),
}

#[pymethods]
impl Sides {
    #[new]
    fn new(tokens: PyReadonlyArray2<'_, u64>, sides: Vec<u32>) -> PyResult<Self> {
        let [windows, folds] = sizes(tokens.shape());
        if !(1..=32).contains(&folds) {
            return Err(Error::shape("tokens", "from 1 to 32 folds", &folds).into());
        }
        let shape = (windows, sides.len());
        Ok(Self { sides: crate::replay::sides::Sides::new(tokens.as_slice()?, folds, &sides), shape })
    }

    fn rows<'py>(&self, py: Python<'py>) -> PyResult<SideRows<'py>> {
        let rows = &self.sides.rows;
        Ok((
            rows.iter().map(|row| row.window).collect::<Vec<_>>().into_pyarray(py),
            rows.iter().map(|row| row.tokens).collect::<Vec<_>>().into_pyarray(py),
            rows.iter().map(|row| row.length).collect::<Vec<_>>().into_pyarray(py),
            array2(py, self.shape, self.sides.of_side.clone())?,
        ))
    }

    #[pyo3(signature = (window, fold, counts, table, threads = None))]
    fn add_up(
        &self,
        py: Python<'_>,
        window: PyReadonlyArray1<'_, u32>,
        fold: PyReadonlyArray1<'_, u8>,
        counts: CellCounts<'_>,
        mut table: PyReadwriteArray3<'_, f64>,
        threads: Option<usize>,
    ) -> PyResult<()> {
        let cells = Cells { window: window.as_slice()?, fold: fold.as_slice()? };
        let [rows, layers, columns] = sizes(table.shape());
        let size = layers * columns;
        shaped("table", &[rows], &[self.sides.rows.len()])?;
        shaped("fold", &[cells.fold.len()], &[cells.window.len()])?;
        let to = table.as_slice_mut()?;
        macro_rules! add {
            ($counts:expr) => {{
                shaped("counts", $counts.shape(), &[cells.window.len(), layers, columns])?;
                let counts = $counts.as_slice()?;
                detached(py, threads, || self.sides.add_up(cells, counts, size, to))
            }};
        }
        match &counts {
            CellCounts::U8(counts) => add!(counts),
            CellCounts::U16(counts) => add!(counts),
            CellCounts::U32(counts) => add!(counts),
            CellCounts::U64(counts) => add!(counts),
        }
    }
}

/// Returns the error of a counter that is used after it has finished.
fn finished() -> PyErr {
    PyValueError::new_err("the counter is finished; make a new one")
}
