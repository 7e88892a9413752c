//! Layers with copies of experts.

use numpy::{
    PyArray2, PyArray3, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3, PyUntypedArrayMethods,
};
use pyo3::prelude::*;

use super::{alone, array2, array3, caught, contiguous, deadline, detached, slice, watched};
use crate::control::Control;
use crate::error::{Error, SLOTS, room_for};
use crate::layer::construct::{self, NoSlot, QUICK, adapt_layers, fill_layers, replicate};
use crate::layer::terms::fanout;
use crate::layer::terms::noise::Noise;
use crate::layer::terms::together::Pairs;
use crate::layer::terms::windows::Windows;
use crate::layer::{
    EMPTY, Effort, Layer, Links, Move, Pace, Placement, Reach, Site, Split, descend, level_layers, place,
};

/// The placement of every layer, from slots [L,D,S] with -1 for an empty one and the slots of every device [L,D].
fn placements_of(layers: &[Layer], slots: &[i32], per_device: usize) -> Vec<Placement> {
    let of = |(l, layer): (usize, &Layer)| {
        let d = layer.devices();
        let rows = slots[l * d * per_device..][..d * per_device].chunks_exact(per_device).zip(&layer.room);
        let expert = |&e: &i32| u16::try_from(e).unwrap_or(EMPTY);
        Placement::new(layer, rows.flat_map(|(row, &room)| row[..room].iter().map(expert)).collect())
    };
    layers.iter().enumerate().map(of).collect()
}

/// The reverse of [`placements_of`].
fn slots_of(layers: &[Layer], placement: &[Placement], per_device: usize) -> Vec<i32> {
    let mut slots = Vec::with_capacity(layers.len() * layers.first().map_or(0, Layer::devices) * per_device);
    for (layer, placement) in layers.iter().zip(placement) {
        let mut at = 0;
        for &room in &layer.room {
            let expert = |&e: &u16| if e == EMPTY { -1 } else { i32::from(e) };
            slots.extend(placement.expert_in[at..at + room].iter().map(expert));
            slots.extend(std::iter::repeat_n(-1, per_device - room));
            at += room;
        }
    }
    slots
}

impl Layers {
    /// Placements of slots [L,D,S].
    fn begin(&self, start: &PyReadonlyArray3<'_, i32>) -> PyResult<Vec<Placement>> {
        let [l, _, d] = self.sizes();
        shaped("start", start.shape(), &[l, d, self.per_device])?;
        let start = contiguous(start.as_slice().ok())?;
        caught(|| placements_of(&self.layers, start, self.per_device))
    }
}

/// What the steps of a descent write, what is so after each, and whether it was interrupted.
type Descent<'py> = (Bound<'py, PyArray2<i64>>, Bound<'py, PyArray2<i32>>, Bound<'py, PyArray2<f64>>, bool);

/// Layers with copies: their windows and devices; all else that counts has a method of its own.
#[pyclass(module = "moetuner._core")]
pub(super) struct Layers {
    layers: Vec<Layer>,
    per_device: usize,
}

/// Checks the shape of an argument.
fn shaped(what: &'static str, found: &[usize], expected: &[usize]) -> PyResult<()> {
    let rule = || format!("shape {expected:?}");
    (found == expected)
        .then_some(())
        .ok_or_else(|| Error::Shape { what, rule: rule(), found: format!("{found:?}") }.into())
}

impl Layers {
    /// Layers, experts and devices.
    fn sizes(&self) -> [usize; 3] {
        let first = self.layers.first();
        [self.layers.len(), first.map_or(0, |layer| layer.experts), first.map_or(0, Layer::devices)]
    }

    /// Every layer with its part of a table whose first axis is layers.
    fn with<'a, T>(&'a mut self, table: &'a [T]) -> impl Iterator<Item = (&'a mut Layer, &'a [T])> {
        let each = (table.len() / self.layers.len().max(1)).max(1);
        self.layers.iter_mut().zip(table.chunks_exact(each))
    }
}

#[pymethods]
impl Layers {
    #[new]
    #[pyo3(signature = (load, weight, room, node, time, *, nearest, norm, noise = None, mixed = 0.0))]
    fn new(
        load: PyReadonlyArray3<'_, f64>,
        weight: PyReadonlyArray1<'_, f64>,
        room: PyReadonlyArray2<'_, i64>,
        node: Vec<u16>,
        time: Vec<f32>,
        nearest: bool,
        norm: u32,
        noise: Option<(f64, f64, f64)>,
        mixed: f64,
    ) -> PyResult<Self> {
        let (load, weight, room) = (load.as_array(), weight.as_array().to_vec(), room.as_array());
        let (w, l, e) = load.dim();
        let d = node.len();
        let parts = noise.map_or([0.0; 3], |(even, share, variance)| [even, share, variance]);
        let counts = parts.iter().chain([&mixed]).all(|part| part.is_finite() && *part >= 0.0);
        let noise = noise.map(|(even, share, variance)| Noise { even, share, variance });
        let fits = weight.len() == w && room.dim() == (l, d) && time.len() == d;
        if !fits || ![0, 2, 4, 8, 16].contains(&norm) || !counts {
            let rule = format!(
                "weights [{w}], slots [{l}, {d}], times [{d}], norm 0, 2, 4, 8 or 16, noise and mixed of at least 0"
            );
            return Err(Error::Shape { what: "layers", rule, found: "others".into() }.into());
        }
        // Copied tables, and windows in the form of the search, of experts and of devices.
        let per_device = room.iter().copied().max().unwrap_or(0).max(0) as usize;
        if d.saturating_mul(per_device) > SLOTS {
            let rule = format!("at most {SLOTS} slots in a layer, all devices as wide as the widest");
            return Err(Error::Shape { what: "room", rule, found: format!("{d} x {per_device}") }.into());
        }
        room_for("windows", &[l, w.next_multiple_of(16) + 16, e + d, 4 * size_of::<f64>()])?;
        let layer = |l| {
            let rows: Vec<f64> = load.slice(numpy::ndarray::s![.., l, ..]).iter().copied().collect();
            Layer {
                experts: e,
                room: room.row(l).iter().map(|&slots| slots.max(0) as usize).collect(),
                node: node.clone(),
                time: time.clone(),
                split: if nearest { Split::Nearest } else { Split::Even },
                load: (0..e).map(|e| load.slice(numpy::ndarray::s![.., l, e]).sum()).collect(),
                windows: Windows::new(&rows, &weight, e, norm, noise, mixed),
                cap: f64::INFINITY,
                hold: vec![],
                serve: vec![],
                sets: None,
                pairs: None,
                forbidden: vec![],
                pinned: vec![],
            }
        };
        let layers = caught(|| (0..l).map(layer).collect())?;
        Ok(Self { layers, per_device })
    }

    /// Caps loads `total` [L,E] of devices.
    #[pyo3(signature = (cap, total = None))]
    fn limit(&mut self, cap: Vec<f64>, total: Option<PyReadonlyArray2<'_, f64>>) -> PyResult<()> {
        let [l, e, _] = self.sizes();
        shaped("cap", &[cap.len()], &[l])?;
        for (layer, cap) in self.layers.iter_mut().zip(cap) {
            layer.cap = cap;
        }
        if let Some(total) = total {
            shaped("total", total.shape(), &[l, e])?;
            for (layer, total) in self.with(contiguous(total.as_slice().ok())?) {
                layer.load = total.to_vec();
            }
        }
        Ok(())
    }

    /// Prices copies [L,E,D].
    fn hold(&mut self, price: PyReadonlyArray3<'_, f64>) -> PyResult<()> {
        shaped("hold", price.shape(), &self.sizes())?;
        room_for("hold", &[price.len(), size_of::<f64>()])?;
        for (layer, price) in self.with(contiguous(price.as_slice().ok())?) {
            layer.hold = price.iter().map(|price| price * layer.windows.scale).collect();
        }
        Ok(())
    }

    /// Bans and pins experts [L,E,D].
    #[pyo3(signature = (*, forbidden = None, pinned = None))]
    fn rule(
        &mut self,
        forbidden: Option<PyReadonlyArray3<'_, bool>>,
        pinned: Option<PyReadonlyArray3<'_, bool>>,
    ) -> PyResult<()> {
        for table in [&forbidden, &pinned].into_iter().flatten() {
            shaped("rules", table.shape(), &self.sizes())?;
            room_for("rules", &[table.len()])?;
        }
        for (layer, table) in self.with(slice(forbidden.as_ref())?) {
            layer.forbidden = table.to_vec();
        }
        for (layer, table) in self.with(slice(pinned.as_ref())?) {
            layer.pinned = table.to_vec();
        }
        Ok(())
    }

    /// Prices visits of tokens, by their expert sets.
    #[pyo3(signature = (sets, *, device_cost = 1.0, node_cost = 0.0))]
    fn price_visits(
        &mut self,
        sets: Vec<(PyReadonlyArray2<'_, u16>, PyReadonlyArray1<'_, u64>)>,
        device_cost: f64,
        node_cost: f64,
    ) -> PyResult<()> {
        shaped("sets", &[sets.len()], &[self.layers.len()])?;
        for (layer, (ids, counts)) in self.layers.iter_mut().zip(&sets) {
            let (e, copies) = (layer.experts, layer.slots() > layer.experts);
            let (ids, counts) = (contiguous(ids.as_slice().ok())?, contiguous(counts.as_slice().ok())?);
            if ids.iter().any(|&id| usize::from(id) >= e) || ids.len() % counts.len().max(1) != 0 {
                let rule = format!("ids [N, K] below {e} and counts [N]");
                return Err(Error::Shape { what: "sets", rule, found: "others".into() }.into());
            }
            let (ids, counts, scale) = (ids.to_vec(), counts.to_vec(), layer.windows.scale);
            layer.sets = Some(fanout::Sets::later(move || {
                let mut sets = fanout::Sets::new(&ids, &counts, e, copies);
                sets.device_cost = device_cost * scale;
                sets.node_cost = node_cost * scale;
                sets
            }));
        }
        Ok(())
    }

    /// Prices pairs [L,E,E] that are apart.
    fn price_pairs(&mut self, pairs: PyReadonlyArray3<'_, u64>, pair_cost: f64) -> PyResult<()> {
        let [l, e, _] = self.sizes();
        shaped("pairs", pairs.shape(), &[l, e, e])?;
        for (layer, pairs) in self.with(contiguous(pairs.as_slice().ok())?) {
            let counts = pairs.iter().map(|&count| count as f32).collect();
            layer.pairs = Some(Pairs { counts, cost: pair_cost * layer.windows.scale });
        }
        Ok(())
    }

    /// Improves slots [L,D,S].
    #[pyo3(signature = (start, *, trials, copies = true, empties = true, restarts = 1, rounds = 1, transitions = None, link_cost = None, seed = 0, time_limit = None, threads = None, progress = None))]
    fn place<'py>(
        &mut self,
        py: Python<'py>,
        start: PyReadonlyArray3<'py, i32>,
        trials: u64,
        copies: bool,
        empties: bool,
        restarts: u64,
        rounds: u64,
        transitions: Option<PyReadonlyArray3<'py, u64>>,
        link_cost: Option<PyReadonlyArray2<'py, f64>>,
        seed: u64,
        time_limit: Option<f64>,
        threads: Option<usize>,
        progress: Option<Bound<'py, PyAny>>,
    ) -> PyResult<(Bound<'py, PyArray3<i32>>, bool)> {
        let [l, _, d] = self.sizes();
        let begin = self.begin(&start)?;
        let transitions = slice(transitions.as_ref())?;
        let cost: Vec<f64> = link_cost.map_or(vec![], |cost| cost.as_array().iter().copied().collect());
        let links = Links { transitions, cost: &cost };
        let control = Control::new(deadline(time_limit));
        let layers = &mut self.layers;
        let (found, interrupted) = watched(py, threads, &control, progress.as_ref(), || {
            place(layers, begin, links, Effort { trials, copies, empties, restarts }, rounds, seed, &control)
        })?;
        let slots = slots_of(&self.layers, &found, self.per_device);
        Ok((array3(py, (l, d, self.per_device), slots)?, interrupted))
    }

    /// Steps from slots [L,D,S] down, the one that gains most for a copy that has to be brought first.
    ///
    /// What each writes, twice: where in the flat slots and which expert [N,2]; copies brought, excess and change of the cost after
    /// it [N,3]; and whether it was interrupted.
    #[pyo3(signature = (start, held, *, most = None, copies = true, transitions = None, link_cost = None, time_limit = None, threads = None))]
    fn descend<'py>(
        &mut self,
        py: Python<'py>,
        start: PyReadonlyArray3<'py, i32>,
        held: PyReadonlyArray3<'py, bool>,
        most: Option<u32>,
        copies: bool,
        transitions: Option<PyReadonlyArray3<'py, u64>>,
        link_cost: Option<PyReadonlyArray2<'py, f64>>,
        time_limit: Option<f64>,
        threads: Option<usize>,
    ) -> PyResult<Descent<'py>> {
        let begin = self.begin(&start)?;
        let [_, e, d] = self.sizes();
        shaped("held", held.shape(), &self.sizes())?;
        let held = contiguous(held.as_slice().ok())?;
        let held: Vec<Vec<bool>> = held.chunks_exact((e * d).max(1)).map(<[bool]>::to_vec).collect();
        let transitions = slice(transitions.as_ref())?;
        let cost: Vec<f64> = link_cost.map_or(vec![], |cost| cost.as_array().iter().copied().collect());
        let links = Links { transitions, cost: &cost };
        let reach = Reach { most: most.map_or(i64::MAX / 2, i64::from), copies };
        let control = Control::new(deadline(time_limit));
        let layers = &mut self.layers;
        let (steps, interrupted) = watched(py, threads, &control, None, || {
            descend(layers, begin.clone(), &held, links, reach, &control)
        })?;
        let mut now = begin;
        let (mut places, mut experts, mut figures) = (Vec::new(), Vec::new(), Vec::new());
        for step in &steps {
            let placement = &mut now[step.layer];
            let slots = match step.step {
                Move::Swap(p, q) => [p, q],
                Move::Put(p, _) => [p, p],
            };
            placement.apply(&self.layers[step.layer], step.step);
            for slot in slots {
                let device = usize::from(placement.device_of(slot));
                let first: usize = self.layers[step.layer].room[..device].iter().sum();
                places.push(((step.layer * d + device) * self.per_device + slot - first) as i64);
                let expert = placement.expert_in[slot];
                experts.push(if expert == EMPTY { -1 } else { i32::from(expert) });
            }
            figures.extend([step.moved as f64, step.excess, step.change]);
        }
        let n = steps.len();
        let written = (array2(py, (n, 2), places)?, array2(py, (n, 2), experts)?);
        Ok((written.0, written.1, array2(py, (n, 3), figures)?, interrupted))
    }

    /// Slots [L,D,S]: copies of the heaviest experts, then the heaviest copy first to the device done first, polished.
    #[pyo3(signature = (*, copies = true, threads = None))]
    fn construct<'py>(
        &self,
        py: Python<'py>,
        copies: bool,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyArray3<i32>>> {
        use rayon::prelude::*;
        let construct = |(l, layer): (usize, &Layer)| {
            let slots = replicate(layer, QUICK, copies)
                .map_err(|NoSlot(expert)| Error::NoSlot { layer: l, expert })?;
            Ok(Placement::new(layer, slots))
        };
        let placement: Result<Vec<Placement>, Error> =
            detached(py, threads, || self.layers.par_iter().enumerate().map(construct).collect())?;
        let slots = slots_of(&self.layers, &placement?, self.per_device);
        let [l, _, d] = self.sizes();
        array3(py, (l, d, self.per_device), slots)
    }
}

#[pyfunction]
#[pyo3(signature = (load, room, time, *, trials = QUICK, copies = true, forbidden = None, pinned = None))]
pub(super) fn replicate_experts<'py>(
    py: Python<'py>,
    load: PyReadonlyArray2<'py, f64>,
    room: PyReadonlyArray2<'py, i64>,
    time: PyReadonlyArray1<'py, f64>,
    trials: usize,
    copies: bool,
    forbidden: Option<PyReadonlyArray3<'py, bool>>,
    pinned: Option<PyReadonlyArray3<'py, bool>>,
) -> PyResult<Bound<'py, PyArray3<i32>>> {
    let &[l, e] = load.shape() else { unreachable!("the array has two dimensions") };
    let d = time.shape()[0];
    shaped("room", room.shape(), &[l, d])?;
    for rules in [&forbidden, &pinned].into_iter().flatten() {
        shaped("rules", rules.shape(), &[l, e, d])?;
    }
    let (load, time) = (contiguous(load.as_slice().ok())?, contiguous(time.as_slice().ok())?);
    let (forbidden, pinned) = (slice(forbidden.as_ref())?, slice(pinned.as_ref())?);
    let room: Vec<usize> = room.as_array().iter().map(|&slots| slots.max(0) as usize).collect();
    let per_device = room.iter().copied().max().unwrap_or(0);
    let all = Site { room: &room, time, forbidden, pinned, copies };
    let slots = alone(py, || fill_layers(load, e, all, trials))??;
    array3(py, (l, d, per_device), slots)
}

/// Slots, and of every layer the time of the slowest device before and after, and copies brought.
type Adapted<'py> = (Bound<'py, PyArray3<i32>>, Vec<f64>, Vec<f64>, Vec<usize>);

#[pyfunction]
#[pyo3(signature = (load, slots, time, *, most, dead_zone, deviations, steps, trials = QUICK, copies = true, full = true, price = 0.0, forbidden = None))]
pub(super) fn adapt_slots<'py>(
    py: Python<'py>,
    load: PyReadonlyArray2<'py, f64>,
    slots: PyReadonlyArray3<'py, i32>,
    time: PyReadonlyArray1<'py, f64>,
    most: usize,
    dead_zone: f64,
    deviations: f64,
    steps: usize,
    trials: usize,
    copies: bool,
    full: bool,
    price: f64,
    forbidden: Option<PyReadonlyArray3<'py, bool>>,
) -> PyResult<Adapted<'py>> {
    let &[l, e] = load.shape() else { unreachable!("the array has two dimensions") };
    let (d, per_device) = (time.shape()[0], slots.shape()[2]);
    shaped("slots", slots.shape(), &[l, d, per_device])?;
    if let Some(rules) = &forbidden {
        shaped("rules", rules.shape(), &[l, e, d])?;
    }
    if !(1..=SLOTS).contains(&d.saturating_mul(per_device)) {
        let rule = format!("1 to {SLOTS} slots in a layer");
        return Err(Error::Shape { what: "slots", rule, found: format!("{d} x {per_device}") }.into());
    }
    let (load, time) = (contiguous(load.as_slice().ok())?, contiguous(time.as_slice().ok())?);
    let mut now = contiguous(slots.as_slice().ok())?.to_vec();
    let (room, forbidden) = (vec![per_device; d], slice(forbidden.as_ref())?);
    let all = Site { room: &room, time, forbidden, pinned: &[], copies };
    let reach = construct::Reach { most, dead_zone, deviations, price, steps, trials, full };
    let changes = alone(py, || adapt_layers(load, e, all, &mut now, reach))??;
    let of = |pick: fn(&construct::Change) -> f64| changes.iter().map(pick).collect();
    let (before, after) = (of(|change| change.slowest.0), of(|change| change.slowest.1));
    let brought = changes.iter().map(|change| change.brought).collect();
    Ok((array3(py, (l, d, per_device), now)?, before, after, brought))
}

#[pyfunction]
#[pyo3(signature = (load, weight, room, time, *, trials, noise, start = None, price = 0.0, copies = true, forbidden = None, pinned = None, seed = 0, time_limit = None, threads = None, alone = false, progress = None))]
pub(super) fn level_windows<'py>(
    py: Python<'py>,
    load: PyReadonlyArray3<'py, f64>,
    weight: PyReadonlyArray1<'py, f64>,
    room: PyReadonlyArray2<'py, i64>,
    time: PyReadonlyArray1<'py, f64>,
    trials: u64,
    noise: f64,
    start: Option<PyReadonlyArray3<'py, i32>>,
    price: f64,
    copies: bool,
    forbidden: Option<PyReadonlyArray3<'py, bool>>,
    pinned: Option<PyReadonlyArray3<'py, bool>>,
    seed: u64,
    time_limit: Option<f64>,
    threads: Option<usize>,
    alone: bool,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<(Bound<'py, PyArray3<i32>>, bool)> {
    let &[w, l, e] = load.shape() else { unreachable!("the array has three dimensions") };
    let d = time.shape()[0];
    shaped("weight", weight.shape(), &[w])?;
    shaped("room", room.shape(), &[l, d])?;
    for rules in [&forbidden, &pinned].into_iter().flatten() {
        shaped("rules", rules.shape(), &[l, e, d])?;
    }
    let room: Vec<usize> = room.as_array().iter().map(|&slots| slots.max(0) as usize).collect();
    let per_device = room.iter().copied().max().unwrap_or(0);
    let mut slots = if let Some(start) = &start {
        shaped("start", start.shape(), &[l, d, per_device])?;
        contiguous(start.as_slice().ok())?.to_vec()
    } else {
        room_for("slots", &[l, d, per_device, size_of::<i32>()])?;
        vec![-1; l * d * per_device]
    };
    let (load, weight) = (contiguous(load.as_slice().ok())?, contiguous(weight.as_slice().ok())?);
    let time = contiguous(time.as_slice().ok())?;
    let (forbidden, pinned) = (slice(forbidden.as_ref())?, slice(pinned.as_ref())?);
    let all = Site { room: &room, time, forbidden, pinned, copies };
    let pace = Pace { trials, noise, price };
    let interrupted = if alone {
        super::alone(py, || level_layers(load, weight, e, all, &mut slots, pace, seed, None))??;
        false
    } else {
        let control = Control::new(deadline(time_limit));
        let (levelled, interrupted) = watched(py, threads, &control, progress.as_ref(), || {
            level_layers(load, weight, e, all, &mut slots, pace, seed, Some(&control))
        })?;
        levelled?;
        interrupted
    };
    Ok((array3(py, (l, d, per_device), slots)?, interrupted))
}
