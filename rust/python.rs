//! The Python module `moetuner._core`: views in, one call, arrays out. The only file that knows pyo3.

// Extracted arguments arrive by value; field names of classes are seen by nobody.
#![allow(clippy::needless_pass_by_value, clippy::struct_field_names)]

use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use numpy::ndarray::{Array2, Array3};
use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArray3, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2,
    PyReadonlyArray3, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyKeyboardInterrupt, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use rayon::prelude::*;

use crate::bottleneck::{Chain, Way};
use crate::colocation::Layout;
use crate::error::Error;
use crate::instance::{Instance, Sizes};
use crate::packing::{Goal, Improve, Room, smallest_peak};
use crate::search::{Control, Options, balanced, search as run_search};
use crate::statistics::{Counter, Tables};
use crate::trace::Routing;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// Expert ids as numpy hands them over.
#[derive(FromPyObject)]
enum Ids<'py> {
    U8(PyReadonlyArray3<'py, u8>),
    U16(PyReadonlyArray3<'py, u16>),
}

impl Ids<'_> {
    fn shape(&self) -> &[usize] {
        match self {
            Ids::U8(array) => array.shape(),
            Ids::U16(array) => array.shape(),
        }
    }

    /// A shard of another model must not pass for one of this.
    fn check(&self, routing: Routing) -> Result<(), Error> {
        let Routing { layers, top_k, .. } = routing;
        if self.shape()[1..] == [layers, top_k] {
            return Ok(());
        }
        let rule = format!("shape [tokens, {layers}, {top_k}]");
        Err(Error::Shape { what: "expert_ids", rule, found: format!("{:?}", self.shape()) })
    }
}

/// Runs `$body` with `$ids` as a slice, whatever its integer type is.
macro_rules! with_ids {
    ($ids:expr, $slice:ident => $body:expr) => {
        match &$ids {
            Ids::U8(array) => {
                let $slice = contiguous(array.as_slice().ok())?;
                $body
            }
            Ids::U16(array) => {
                let $slice = contiguous(array.as_slice().ok())?;
                $body
            }
        }
    };
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

#[pyfunction]
#[pyo3(signature = (expert_ids, num_experts, first_token = 0))]
fn validate(py: Python<'_>, expert_ids: Ids<'_>, num_experts: usize, first_token: u64) -> PyResult<()> {
    let &[_, layers, top_k] = expert_ids.shape() else { unreachable!("the array has three dimensions") };
    let routing = Routing::new(layers, num_experts, top_k)?;
    with_ids!(expert_ids, ids => Ok(detached(py, None, || crate::trace::validate(ids, routing, first_token))??))
}

/// Counts a trace shard by shard.
#[pyclass(module = "moetuner._core")]
struct StatisticsCounter {
    routing: Routing,
    counter: Option<Counter>,
    // numpy's memory: it asks for huge pages, which halves the time of wide tables.
    transitions: Option<Py<PyArray3<u64>>>,
    coactivation: Option<Py<PyArray3<u64>>>,
}

/// tokens, load [W,L,E], transitions [L-1,E,E], coactivation [L,E,E]
type Counts<'py> = (u64, Bound<'py, PyArray3<u64>>, Option<Py<PyArray3<u64>>>, Option<Py<PyArray3<u64>>>);

#[pymethods]
impl StatisticsCounter {
    #[new]
    #[pyo3(signature = (layers, num_experts, top_k, *, window = None, transitions = true, coactivation = true))]
    fn new(
        py: Python<'_>,
        layers: usize,
        num_experts: usize,
        top_k: usize,
        window: Option<u64>,
        transitions: bool,
        coactivation: bool,
    ) -> PyResult<Self> {
        let routing = Routing::new(layers, num_experts, top_k)?;
        if window == Some(0) {
            return Err(PyValueError::new_err("window must be at least 1 token, got 0"));
        }
        let table = |wanted: bool, n: usize| -> Option<Py<PyArray3<u64>>> {
            wanted.then(|| PyArray3::zeros(py, (n, num_experts, num_experts), false).unbind())
        };
        Ok(Self {
            routing,
            counter: Some(Counter::new(routing, window)),
            transitions: table(transitions, layers - 1),
            coactivation: table(coactivation, layers),
        })
    }

    #[pyo3(signature = (expert_ids, threads = None))]
    fn push(&mut self, py: Python<'_>, expert_ids: Ids<'_>, threads: Option<usize>) -> PyResult<()> {
        let counter = self.counter.as_mut().ok_or_else(finished)?;
        expert_ids.check(self.routing)?;
        let lend = |table: &Option<Py<PyArray3<u64>>>| table.as_ref().map(|table| table.bind(py).readwrite());
        let (mut transitions, mut coactivation) = (lend(&self.transitions), lend(&self.coactivation));
        let mut tables = Tables {
            transitions: transitions.as_mut().map(|table| table.as_slice_mut()).transpose()?,
            coactivation: coactivation.as_mut().map(|table| table.as_slice_mut()).transpose()?,
        };
        with_ids!(expert_ids, ids => Ok(detached(py, threads, || counter.push(ids, &mut tables))??))
    }

    fn finish<'py>(&mut self, py: Python<'py>) -> PyResult<Counts<'py>> {
        let counter = self.counter.take().ok_or_else(finished)?;
        let (tokens, windows, load) = py.detach(|| counter.finish());
        let Routing { layers, experts, .. } = self.routing;
        if let Some(coactivation) = &self.coactivation {
            let mut tables = coactivation.bind(py).readwrite();
            for table in tables.as_slice_mut()?.chunks_exact_mut(experts * experts) {
                // Meeting oneself is load, not co-activation.
                for count in table.iter_mut().step_by(experts + 1) {
                    *count = 0;
                }
            }
        }
        let load = array3(py, (windows, layers, experts), load)?;
        Ok((tokens, load, self.transitions.take(), self.coactivation.take()))
    }
}

/// Replays a trace under a placement, shard by shard.
#[pyclass(module = "moetuner._core")]
struct Replay {
    routing: Routing,
    devices: usize,
    replay: Option<crate::replay::Replay>,
}

/// tokens, load [W,L,D], traffic [L-1,D,D], visits [L,D], fanout [L], node fanout [L]
type Tallied<'py> = (
    u64,
    Bound<'py, PyArray3<u64>>,
    Bound<'py, PyArray3<u64>>,
    Bound<'py, PyArray2<u64>>,
    Bound<'py, PyArray1<u64>>,
    Bound<'py, PyArray1<u64>>,
);

#[pymethods]
impl Replay {
    #[new]
    #[pyo3(signature = (slots, num_experts, top_k, node_of_device, *, window = None))]
    fn new(
        slots: PyReadonlyArray3<'_, i32>,
        num_experts: usize,
        top_k: usize,
        node_of_device: Vec<u16>,
        window: Option<u64>,
    ) -> PyResult<Self> {
        let &[layers, devices, per_device] = slots.shape() else {
            unreachable!("the array has three dimensions")
        };
        let routing = Routing::new(layers, num_experts, top_k)?;
        if node_of_device.len() != devices || node_of_device.iter().any(|&node| usize::from(node) >= devices)
        {
            let rule =
                format!("a node from 0 to {} for each of {devices} devices", devices.saturating_sub(1));
            let found = format!("{} values", node_of_device.len());
            return Err(Error::Shape { what: "node_of_device", rule, found }.into());
        }
        if window == Some(0) {
            return Err(PyValueError::new_err("window must be at least 1 token, got 0"));
        }
        let slots = contiguous(slots.as_slice().ok())?;
        let copies = crate::replay::Copies::new(slots, routing, per_device, &node_of_device)?;
        Ok(Self { routing, devices, replay: Some(crate::replay::Replay::new(routing, copies, window)) })
    }

    #[pyo3(signature = (expert_ids, threads = None))]
    fn push(&mut self, py: Python<'_>, expert_ids: Ids<'_>, threads: Option<usize>) -> PyResult<()> {
        let replay = self.replay.as_mut().ok_or_else(finished)?;
        expert_ids.check(self.routing)?;
        with_ids!(expert_ids, ids => Ok(detached(py, threads, || replay.push(ids))??))
    }

    fn finish<'py>(&mut self, py: Python<'py>) -> PyResult<Tallied<'py>> {
        let replay = self.replay.take().ok_or_else(finished)?;
        let tally = py.detach(|| replay.finish());
        let (layers, d) = (self.routing.layers, self.devices);
        Ok((
            tally.tokens,
            array3(py, (tally.windows, layers, d), tally.load)?,
            array3(py, (layers - 1, d, d), tally.traffic)?,
            array2(py, (layers, d), tally.visits)?,
            tally.fanout.into_pyarray(py),
            tally.node_fanout.into_pyarray(py),
        ))
    }
}

fn slice<'a, T: numpy::Element>(array: Option<&'a PyReadonlyArray3<'_, T>>) -> PyResult<&'a [T]> {
    array.map_or(Ok(&[]), |array| contiguous(array.as_slice().ok()))
}

/// The problem of placing experts, from arrays: load [L,E], cap [L,D], cost [D,D], transitions and co-activation.
fn instance_of(
    load: &PyReadonlyArray2<'_, u64>,
    cap: &PyReadonlyArray2<'_, u64>,
    cost: &PyReadonlyArray2<'_, i64>,
    per_device: usize,
    [transitions, coactivation]: [Option<&PyReadonlyArray3<'_, u64>>; 2],
) -> PyResult<Instance> {
    let sizes =
        Sizes { layers: load.shape()[0], experts: load.shape()[1], devices: cost.shape()[0], per_device };
    Ok(Instance::new(
        sizes,
        contiguous(load.as_slice().ok())?,
        slice(transitions)?,
        slice(coactivation)?,
        contiguous(cap.as_slice().ok())?,
        contiguous(cost.as_slice().ok())?,
    )?)
}

/// Slots [L,D,S], the caps kept [L,D], trials made, whether it was interrupted, bits cut from the counts.
type Searched<'py> = (Bound<'py, PyArray3<i32>>, Bound<'py, PyArray2<u64>>, u64, bool, u32);

#[pyfunction]
#[pyo3(signature = (load, cap, cost, slots_per_device, *, transitions = None, coactivation = None, seed = 0,
                    trials = None, time_limit = None, threads = None, initial = Vec::new(), progress = None))]
fn search<'py>(
    py: Python<'py>,
    load: PyReadonlyArray2<'py, u64>,
    cap: PyReadonlyArray2<'py, u64>,
    cost: PyReadonlyArray2<'py, i64>,
    slots_per_device: usize,
    transitions: Option<PyReadonlyArray3<'py, u64>>,
    coactivation: Option<PyReadonlyArray3<'py, u64>>,
    seed: u64,
    trials: Option<u64>,
    time_limit: Option<f64>,
    threads: Option<usize>,
    initial: Vec<PyReadonlyArray3<'py, i32>>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Searched<'py>> {
    let pairs = [transitions.as_ref(), coactivation.as_ref()];
    let mut instance = instance_of(&load, &cap, &cost, slots_per_device, pairs)?;
    let sizes = instance.sizes;
    let initial =
        initial.iter().map(|slots| Ok(sizes.fill(slice(Some(slots))?)?)).collect::<PyResult<Vec<_>>>()?;
    let time_limit = match time_limit.map(Duration::try_from_secs_f64) {
        None => None,
        Some(Ok(limit)) => Some(limit),
        // Longer than the clock can count: no limit. Shorter than nothing: no time.
        Some(Err(_)) => (!time_limit.is_some_and(|t| t > 0.0)).then_some(Duration::ZERO),
    };
    let options = Options { seed, trials, time_limit };
    let control = Control::new(time_limit.and_then(|limit| Instant::now().checked_add(limit)));
    // Where no placement under the cap is known the most balanced one is what can be kept.
    let balanced = detached(py, threads, || balanced(&instance, &control))??;
    instance.allow(&balanced);
    let work = || run_search(&instance, &options, &balanced, &initial, &control);
    let (found, interrupted) = watched(py, threads, &control, progress.as_ref(), work)?;
    let shape = (sizes.layers, sizes.devices, slots_per_device);
    let trials = control.trials.load(Ordering::Relaxed);
    let cap = array2(py, (sizes.layers, sizes.devices), instance.cap.clone())?;
    Ok((array3(py, shape, sizes.unfill(&found))?, cap, trials, interrupted, instance.shift))
}

/// Peak and its bound, deviation times clusters and its bound: one row per layer.
type Balance = Vec<(u128, u128, u128, u128)>;

fn pack<'py>(
    py: Python<'py>,
    load: &PyReadonlyArray2<'py, u64>,
    devices: usize,
    room: Room,
    goal: Option<Goal>,
    threads: Option<usize>,
) -> PyResult<(Bound<'py, PyArray2<u16>>, Balance)> {
    let (layers, experts) = (load.shape()[0], load.shape()[1]);
    let load = contiguous(load.as_slice().ok())?;
    let improve = goal.map(|goal| Improve { goal, stop: &|| false });
    let packed = detached(py, threads, || crate::packing::pack(load, experts, devices, room, improve))??;
    let balance = packed.iter().map(|p| (p.peak.0, p.peak.1, p.deviation.0, p.deviation.1)).collect();
    let cluster = packed.into_iter().flat_map(|p| p.cluster).collect();
    Ok((array2(py, (layers, experts), cluster)?, balance))
}

#[pyfunction]
#[pyo3(signature = (load, devices, slots, *, improve = false, threads = None))]
fn lpt<'py>(
    py: Python<'py>,
    load: PyReadonlyArray2<'py, u64>,
    devices: usize,
    slots: usize,
    improve: bool,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray2<u16>>> {
    let room = Room { fewest: 0, most: slots };
    Ok(pack(py, &load, devices, room, improve.then_some(Goal::Peak), threads)?.0)
}

#[pyfunction]
#[pyo3(signature = (load, devices, slots, found, *, threads = None))]
fn smallest_peaks(
    py: Python<'_>,
    load: PyReadonlyArray2<'_, u64>,
    devices: usize,
    slots: usize,
    found: PyReadonlyArray1<'_, u64>,
    threads: Option<usize>,
) -> PyResult<Vec<(u128, u128)>> {
    let experts = load.shape()[1].max(1);
    let (load, found) = (contiguous(load.as_slice().ok())?, contiguous(found.as_slice().ok())?);
    let layers = load.par_chunks(experts).zip(found);
    let peak = |(load, &found): (&[u64], &u64)| smallest_peak(load, devices, slots, found.into());
    let peaks = detached(py, threads, || layers.map(peak).collect::<Result<_, Error>>())?;
    Ok(peaks?)
}

#[pyfunction]
#[pyo3(signature = (load, clusters, slots, *, equal_sizes = true, tolerance = 0.0, threads = None))]
fn cluster<'py>(
    py: Python<'py>,
    load: PyReadonlyArray2<'py, u64>,
    clusters: usize,
    slots: usize,
    equal_sizes: bool,
    tolerance: f64,
    threads: Option<usize>,
) -> PyResult<(Bound<'py, PyArray2<u16>>, Balance)> {
    let experts = load.shape()[1];
    let room = if equal_sizes && clusters > 0 {
        Room::equal(experts, clusters)
    } else {
        Room::free(experts, clusters, slots)
    };
    pack(py, &load, clusters, room, Some(Goal::Deviation { tolerance }), threads)
}

/// The device of every cluster [L,D], how it was found, a lower bound of the bottleneck.
type Placed<'py> = (Bound<'py, PyArray2<u16>>, &'static str, u128);

#[pyfunction]
#[pyo3(signature = (traffic, cost, *, sizes = None, start = None, threads = None))]
fn place_clusters<'py>(
    py: Python<'py>,
    traffic: PyReadonlyArray3<'py, u64>,
    cost: PyReadonlyArray2<'py, u64>,
    sizes: Option<PyReadonlyArray2<'py, u64>>,
    start: Option<PyReadonlyArray2<'py, u16>>,
    threads: Option<usize>,
) -> PyResult<Placed<'py>> {
    let (layers, devices) = (traffic.shape()[0] + 1, cost.shape()[0]);
    let sizes = sizes.as_ref().map(|sizes| contiguous(sizes.as_slice().ok())).transpose()?;
    let start = start.as_ref().map(|start| contiguous(start.as_slice().ok())).transpose()?;
    let (traffic, cost) = (contiguous(traffic.as_slice().ok())?, contiguous(cost.as_slice().ok())?);
    let chain = Chain { traffic, cost, sizes, start, layers, devices };
    let placed = detached(py, threads, || chain.place())??;
    let way = match placed.way {
        Way::Uniform => "exact: uniform links",
        Way::DynamicProgramming => "exact: dynamic programming",
        Way::LocalSearch => "heuristic: local search",
    };
    Ok((array2(py, (layers, devices), placed.device)?, way, placed.bound))
}

/// Slots [L,D,S], cost, the caps kept [L].
type Optimal<'py> = (Bound<'py, PyArray3<i32>>, i64, Bound<'py, PyArray1<u64>>);

#[pyfunction]
#[pyo3(signature = (load, cap, cost, slots_per_device, *, transitions = None, coactivation = None, work, threads = None))]
fn exact_chain<'py>(
    py: Python<'py>,
    load: PyReadonlyArray2<'py, u64>,
    cap: PyReadonlyArray2<'py, u64>,
    cost: PyReadonlyArray2<'py, i64>,
    slots_per_device: usize,
    transitions: Option<PyReadonlyArray3<'py, u64>>,
    coactivation: Option<PyReadonlyArray3<'py, u64>>,
    work: u64,
    threads: Option<usize>,
) -> PyResult<Option<Optimal<'py>>> {
    let pairs = [transitions.as_ref(), coactivation.as_ref()];
    let instance = instance_of(&load, &cap, &cost, slots_per_device, pairs)?;
    let sizes = instance.sizes;
    let found = detached(py, threads, || crate::partitions::optimum(&instance, work))?;
    let Some(found) = found else { return Ok(None) };
    let shape = (sizes.layers, sizes.devices, slots_per_device);
    let slots = array3(py, shape, sizes.unfill(&found.expert_in))?;
    Ok(Some((slots, found.cost, found.cap.into_pyarray(py))))
}

/// Columns of broken triangles [n,3], the last with the minus; rows, columns and factors of broken gatherings.
type BrokenRows<'py> = (
    Bound<'py, PyArray2<i64>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<f64>>,
);

#[pyfunction]
#[pyo3(signature = (values, sizes, layers, entries, boundaries, *, slack, most, threads = None))]
fn separate<'py>(
    py: Python<'py>,
    values: PyReadonlyArray1<'py, f64>,
    sizes: Vec<usize>,
    layers: usize,
    entries: usize,
    boundaries: usize,
    slack: f64,
    most: usize,
    threads: Option<usize>,
) -> PyResult<BrokenRows<'py>> {
    let layout = Layout { sizes, layers, entries, boundaries };
    let values = contiguous(values.as_slice().ok())?;
    if values.len() != layout.columns() || boundaries >= layers.max(1) {
        let rule = format!("[{}]", layout.columns());
        return Err(Error::Shape { what: "values", rule, found: values.len().to_string() }.into());
    }
    let (triangles, gatherings) = detached(py, threads, || {
        (layout.triangles(values, slack, most), layout.gatherings(values, slack, most))
    })?;
    let count = triangles.len();
    let triangles = triangles.into_iter().flatten().map(|column| column as i64).collect();
    let (mut rows, mut columns, mut factors) = (Vec::new(), Vec::new(), Vec::new());
    for (row, gathering) in (0..).zip(gatherings) {
        for (column, factor) in gathering {
            rows.push(row);
            columns.push(column as i64);
            factors.push(factor);
        }
    }
    let triangles = array2(py, (count, 3), triangles)?;
    Ok((triangles, rows.into_pyarray(py), columns.into_pyarray(py), factors.into_pyarray(py)))
}

/// A certificate's lambda, columns, multipliers of the cuts, cuts, choices, and contents, as flat arrays.
type CertificateArrays<'py> = (
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<i32>>,
    Bound<'py, PyArray1<u8>>,
    Bound<'py, PyArray1<f64>>,
);

/// Proven cost, which bound it is, iterations, why it ended, whether it was interrupted, and the proof.
type Bounded<'py> = (u64, &'static str, usize, &'static str, bool, CertificateArrays<'py>);

#[pyfunction]
#[pyo3(signature = (load, transitions, cap, devices, *, iterations, target = None, gap = 0.0, time_limit = None,
                    threads = None, progress = None))]
fn bound<'py>(
    py: Python<'py>,
    load: PyReadonlyArray2<'py, u64>,
    transitions: PyReadonlyArray3<'py, u64>,
    cap: PyReadonlyArray1<'py, u64>,
    devices: usize,
    iterations: usize,
    target: Option<u64>,
    gap: f64,
    time_limit: Option<f64>,
    threads: Option<usize>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Bounded<'py>> {
    let instance = bound_instance(&load, &transitions, &cap, devices)?;
    let limit = time_limit.and_then(|limit| Duration::try_from_secs_f64(limit).ok());
    let control = Control::new(limit.and_then(|limit| Instant::now().checked_add(limit)));
    let limits =
        crate::bound::Limits { iterations, target, gap, deadline: control.deadline(), stop: &control.stop };
    // The best so far: a bound rises, so the watched number is its negative.
    let report = |p: crate::bound::Progress| {
        control.best.fetch_min(-i64::try_from(p.cost).unwrap_or(i64::MAX), Ordering::Relaxed);
    };
    let work = || crate::bound::bound(&instance, &limits, report);
    let (bound, interrupted) = watched(py, threads, &control, progress.as_ref(), work)?;
    let bound = bound?;
    let source = match bound.source {
        crate::bound::Source::Trivial => "trivial",
        crate::bound::Source::Transportation => "transportation",
        crate::bound::Source::Semidefinite => "semidefinite",
    };
    let stop = match bound.stop {
        crate::bound::Stop::Gap => "gap reached",
        crate::bound::Stop::Stalled => "no further progress",
        crate::bound::Stop::Iterations => "iterations",
        crate::bound::Stop::Deadline => "time limit",
        crate::bound::Stop::Asked => "interrupted",
        crate::bound::Stop::Size => "size",
    };
    let proof = bound.certificate;
    let arrays = (
        proof.lambda.into_pyarray(py),
        proof.columns.into_pyarray(py),
        proof.multipliers.into_pyarray(py),
        proof.cuts.into_pyarray(py),
        proof.choices.into_pyarray(py),
        proof.contents.into_pyarray(py),
    );
    Ok((bound.cost, source, bound.iterations, stop, interrupted, arrays))
}

#[pyfunction]
#[pyo3(signature = (load, transitions, cap, devices, lambda_, columns, multipliers, cuts, choices, contents))]
fn verify_bound<'py>(
    py: Python<'py>,
    load: PyReadonlyArray2<'py, u64>,
    transitions: PyReadonlyArray3<'py, u64>,
    cap: PyReadonlyArray1<'py, u64>,
    devices: usize,
    lambda_: PyReadonlyArray1<'py, f64>,
    columns: PyReadonlyArray1<'py, f64>,
    multipliers: PyReadonlyArray1<'py, f64>,
    cuts: PyReadonlyArray1<'py, i32>,
    choices: PyReadonlyArray1<'py, u8>,
    contents: PyReadonlyArray1<'py, f64>,
) -> PyResult<u64> {
    let instance = bound_instance(&load, &transitions, &cap, devices)?;
    let certificate = crate::bound::Certificate {
        lambda: lambda_.as_slice()?.to_vec(),
        columns: columns.as_slice()?.to_vec(),
        multipliers: multipliers.as_slice()?.to_vec(),
        cuts: cuts.as_slice()?.to_vec(),
        choices: choices.as_slice()?.to_vec(),
        contents: contents.as_slice()?.to_vec(),
    };
    Ok(detached(py, None, || crate::bound::verify(&instance, &certificate))??)
}

fn bound_instance<'a>(
    load: &'a PyReadonlyArray2<'_, u64>,
    transitions: &'a PyReadonlyArray3<'_, u64>,
    cap: &'a PyReadonlyArray1<'_, u64>,
    devices: usize,
) -> PyResult<crate::bound::Instance<'a>> {
    Ok(crate::bound::Instance {
        layers: load.shape()[0],
        experts: load.shape()[1],
        devices,
        transitions: contiguous(transitions.as_slice().ok())?,
        load: contiguous(load.as_slice().ok())?,
        cap: contiguous(cap.as_slice().ok())?,
    })
}

fn finished() -> PyErr {
    PyValueError::new_err("the counter is finished; make a new one")
}

/// moetuner's native core.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::{
        Replay, StatisticsCounter, bound, cluster, exact_chain, lpt, place_clusters, search, separate,
        smallest_peaks, validate, verify_bound,
    };

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
