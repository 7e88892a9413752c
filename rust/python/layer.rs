//! Layers with copies of experts.

use numpy::{
    PyArray2, PyArray3, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use rayon::prelude::*;

use super::rules::LayerRules;
use super::{alone, array2, array3, caught, contiguous, deadline, detached, shaped, slice, watched};
use crate::assignment::assign_max;
use crate::control::Control;
use crate::error::{Error, SLOTS, room_for};
use crate::layer::adapt::{self, adapt_layers, keep_devices};
use crate::layer::construct::{QUICK, by_windows, complete, fill_layers, nearest, on_sum};
use crate::layer::descend::{UNLIMITED, descend};
use crate::layer::terms::fanout;
use crate::layer::terms::losses::{Losses, SingleLosses};
use crate::layer::terms::lp_split;
use crate::layer::terms::reading::{Reading, Weights};
use crate::layer::terms::together::Pairs;
use crate::layer::terms::windows::{Measure, Windows};
use crate::layer::turns::{Effort, Links, place};
use crate::layer::{Choice, EMPTY, LANES, Layer, Site, Slots, Spending, Split, choose};

/// The id of a slot's content, -1 for none.
fn expert_id(expert: u16) -> i32 {
    if expert == EMPTY { -1 } else { i32::from(expert) }
}

/// Contents of one layer's slots, from rows of all devices with as many [D,S], -1 for an empty one.
fn contents_of(rows: &[i32], per_device: usize, capacity: &[usize]) -> Vec<u16> {
    let rows = rows.chunks_exact(per_device.max(1)).zip(capacity);
    let expert = |&e: &i32| u16::try_from(e).unwrap_or(EMPTY);
    rows.flat_map(|(row, &slots)| row[..slots].iter().map(expert)).collect()
}

/// Slots [L,D,S] with -1 for an empty one, of the contents of every layer and its devices.
fn slots_of<'py, 'a>(
    py: Python<'py>,
    layers: impl ExactSizeIterator<Item = (&'a [u16], &'a Site)>,
    [devices, per_device]: [usize; 2],
) -> PyResult<Bound<'py, PyArray3<i32>>> {
    let (l, mut slots) = (layers.len(), Vec::new());
    for (mut contents, site) in layers {
        for &count in &site.capacity {
            let (of_device, rest) = contents.split_at(count);
            contents = rest;
            slots.extend(of_device.iter().map(|&e| expert_id(e)));
            slots.extend(std::iter::repeat_n(-1, per_device - count));
        }
    }
    array3(py, (l, devices, per_device), slots)
}

/// Transitions [L-1,E,E] and the cost of one between devices [D,D].
type Joined<'py> = (PyReadonlyArray3<'py, u64>, PyReadonlyArray2<'py, f64>);

/// What joins layers; nothing, where none is given.
fn links_of<'a>(joined: Option<&'a Joined<'_>>) -> PyResult<Links<'a>> {
    let Some((transitions, cost)) = joined else { return Ok(Links { transitions: &[], cost: &[] }) };
    Ok(Links { transitions: slice(Some(transitions))?, cost: contiguous(cost.as_slice().ok())? })
}

/// Layers with copies: their windows and devices; all else that counts has a method of its own.
#[pyclass(module = "moetuner._core")]
pub(super) struct Layers {
    layers: Vec<Layer>,
    per_device: usize,
}

/// Sites of layers with slots [L,D], of devices in one node, and the widest device.
fn sites_of(
    capacity: &PyReadonlyArray2<'_, i64>,
    time: &[f64],
    rules: &LayerRules,
    [l, e]: [usize; 2],
) -> PyResult<(Vec<Site>, usize)> {
    let d = time.len();
    rules.check([l, e, d])?;
    let site = |l: usize| {
        let slots = capacity.as_array().row(l).iter().map(|&slots| slots.max(0) as usize).collect();
        Site { rules: rules.of_layer(l, [e, d]), ..Site::plain(slots, time.to_vec()) }
    };
    let sites: Vec<Site> = (0..l).map(site).collect();
    let widest = sites.iter().flat_map(|site| &site.capacity).copied().max().unwrap_or(0);
    fits("capacity", d, widest)?;
    room_for("slots", &[l, d, widest, size_of::<i32>()])?;
    Ok((sites, widest))
}

/// Refuses layers of more slots than are counted, before anything of the size is asked for.
fn fits(what: &'static str, devices: usize, widest: usize) -> PyResult<()> {
    if devices.saturating_mul(widest) <= SLOTS {
        return Ok(());
    }
    let rule = format!("at most {SLOTS} slots in a layer, all devices as wide as the widest");
    Err(Error::Shape { what, rule, got: format!("{devices} x {widest}") }.into())
}

impl Layers {
    /// Layers, experts and devices.
    fn sizes(&self) -> [usize; 3] {
        let first = self.layers.first();
        [self.layers.len(), first.map_or(0, |layer| layer.experts), first.map_or(0, Layer::devices)]
    }

    /// Every layer with its part of a table whose first axis is layers.
    fn with<'a, T>(&'a mut self, table: &'a [T]) -> impl Iterator<Item = (&'a mut Layer, &'a [T])> {
        let size = (table.len() / self.layers.len().max(1)).max(1);
        self.layers.iter_mut().zip(table.chunks_exact(size))
    }

    /// Placements of slots [L,D,S].
    fn begin(&mut self, start: &PyReadonlyArray3<'_, i32>) -> PyResult<Vec<Slots>> {
        let [l, e, d] = self.sizes();
        let per_device = self.per_device;
        shaped("start", start.shape(), &[l, d, per_device])?;
        let start = contiguous(start.as_slice().ok())?;
        let slots_of = |(layer, rows): (&mut Layer, &[i32])| {
            let capacity = &layer.site.capacity;
            Slots::new(capacity, e, &contents_of(rows, per_device, capacity))
        };
        caught(|| self.with(start).map(slots_of).collect())
    }

    /// Slots [L,D,S] of placements.
    fn end<'py>(&self, py: Python<'py>, placements: &[Slots]) -> PyResult<Bound<'py, PyArray3<i32>>> {
        let all = placements.iter().zip(&self.layers);
        let all = all.map(|(slots, layer)| (&slots.expert_in[..], &layer.site));
        slots_of(py, all, [self.sizes()[2], self.per_device])
    }
}

#[pymethods]
impl Layers {
    #[new]
    #[pyo3(signature = (load, weight, capacity, node, time, *, nearest, norm, noise = 0.0, mixed = 0.0, rules = None))]
    fn new(
        load: PyReadonlyArray3<'_, f64>,
        weight: PyReadonlyArray1<'_, f64>,
        capacity: PyReadonlyArray2<'_, i64>,
        node: Vec<u16>,
        time: Vec<f64>,
        nearest: bool,
        norm: u32,
        noise: f64,
        mixed: f64,
        rules: Option<PyRef<'_, LayerRules>>,
    ) -> PyResult<Self> {
        let free = LayerRules::default();
        let rules = rules.as_deref().unwrap_or(&free);
        let &[w, layers, e] = load.shape() else { unreachable!("the array has three dimensions") };
        let (load, weight, d) = (contiguous(load.as_slice().ok())?, weight.as_array().to_vec(), node.len());
        let (sites, per_device) = sites_of(&capacity, &time, rules, [layers, e])?;
        // Copied tables, and windows in the form of the search, of experts and of devices.
        room_for("windows", &[layers, w.next_multiple_of(LANES) + LANES, e + d, 4 * size_of::<f64>()])?;
        let measure = if norm == 0 { Measure::Peak } else { Measure::Norm { noise, mixed } };
        let split = if nearest { Split::Nearest } else { Split::Even };
        let layer = |(l, site): (usize, Site)| {
            let site = Site { node: node.clone(), split, ..site };
            let rows = load.chunks_exact(e).skip(l).step_by(layers);
            let (rows, mut total) = (rows.collect::<Vec<_>>().concat(), vec![0.0; e]);
            for row in rows.chunks_exact(e) {
                total.iter_mut().zip(row).for_each(|(total, tokens)| *total += tokens);
            }
            let windows = Windows::new(&rows, &weight, e, &site, measure);
            let load = rules.capped_load(l, e).map_or(total, <[f64]>::to_vec);
            Layer::plain(site, load, windows)
        };
        let layers = caught(|| sites.into_iter().enumerate().map(layer).collect())?;
        Ok(Self { layers, per_device })
    }

    /// Prices copies [L,E,D].
    fn price_copies(&mut self, cost: PyReadonlyArray3<'_, f64>) -> PyResult<()> {
        room_for("copy costs", &[cost.len(), size_of::<f64>()])?;
        for (layer, cost) in self.with(contiguous(cost.as_slice().ok())?) {
            layer.costs.copy_cost = cost.iter().map(|cost| cost * layer.windows.scale).collect();
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
        for (layer, (ids, counts)) in self.layers.iter_mut().zip(&sets) {
            let (e, copies) = (layer.experts, layer.slots() > layer.experts);
            let (ids, counts) = (contiguous(ids.as_slice().ok())?, contiguous(counts.as_slice().ok())?);
            let (ids, counts, scale) = (ids.to_vec(), counts.to_vec(), layer.windows.scale);
            layer.costs.sets = Some(fanout::Sets::later(move || {
                let mut sets = fanout::Sets::new(&ids, &counts, e, copies);
                sets.device_cost = device_cost * scale;
                sets.node_cost = node_cost * scale;
                sets
            }));
        }
        Ok(())
    }

    /// Prices weights and rows at the busiest port, in tokens; where visits are `counted`, they are the rows.
    #[pyo3(signature = (*, base, expert, exposed, start, row, counted))]
    fn price_time(&mut self, base: f64, expert: f64, exposed: f64, start: f64, row: f64, counted: bool) {
        let weights = Weights { base, expert, exposed, start };
        for layer in &mut self.layers {
            layer.costs.reading = Reading::new(weights, &layer.windows, layer.experts, &layer.site);
            if counted || layer.costs.reading.is_some() || !layer.site.has_equal_speeds() {
                layer.costs.row = row;
            } else {
                // The slowest device has the busiest port, too: a token costs its row as well.
                layer.windows.scale /= 1.0 + row;
            }
        }
    }

    /// Whether a trial looks at tokens of devices alone: no weights are read for longer, and no rows count apart.
    #[getter]
    fn has_tokens_alone(&self) -> bool {
        self.layers.iter().all(|layer| layer.costs.reading.is_none() && layer.costs.row == 0.0)
    }

    /// Prices pairs [L,E,E] that are apart; of tokens with so many experts in every layer [L] they tell visits, too.
    #[pyo3(signature = (pairs, pair_cost, *, top_k = None))]
    fn price_pairs(
        &mut self,
        pairs: PyReadonlyArray3<'_, u64>,
        pair_cost: f64,
        top_k: Option<Vec<u32>>,
    ) -> PyResult<()> {
        let top_k = top_k.unwrap_or_else(|| vec![1; self.layers.len()]);
        shaped("top_k", &[top_k.len()], &[self.layers.len()])?;
        for ((layer, pairs), top_k) in self.with(contiguous(pairs.as_slice().ok())?).zip(top_k) {
            let counts = pairs.iter().map(|&count| count as f32).collect();
            layer.costs.pairs = Some(Pairs::new(counts, top_k, pair_cost * layer.windows.scale));
        }
        Ok(())
    }

    /// Prices what devices of a domain [D], if they are lost, leave to one of the others, in its mean loads.
    fn price_losses(&mut self, domain: Vec<u16>, loss_cost: f64) -> PyResult<()> {
        shaped("domain", &[domain.len()], &[self.sizes()[2]])?;
        for layer in &mut self.layers {
            let cost = loss_cost * layer.windows.scale;
            layer.costs.losses = Some(Losses { domain: domain.clone(), cost });
        }
        Ok(())
    }

    /// Prices windows of load [W,L,E], of weights [W], whose tokens are divided over copies as is best.
    fn price_lp_split(
        &mut self,
        load: PyReadonlyArray3<'_, f64>,
        weight: PyReadonlyArray1<'_, f64>,
    ) -> PyResult<()> {
        let [layers, experts, devices] = self.sizes();
        let windows = weight.len();
        shaped("load", load.shape(), &[windows, layers, experts])?;
        let slots = self.per_device.saturating_mul(devices);
        room_for("divided windows", &[layers, windows, experts + slots + devices, size_of::<f64>()])?;
        let (load, weight) = (contiguous(load.as_slice().ok())?, weight.as_array());
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let used =
                load.chunks_exact(experts).skip(l).step_by(layers).zip(&weight).filter(|row| *row.1 > 0.0);
            let scale = layer.windows.scale;
            let rows = used.flat_map(|(row, &weight)| row.iter().map(move |tokens| tokens * weight * scale));
            layer.costs.lp_split = Some(lp_split::Loads(rows.collect()));
        }
        Ok(())
    }

    /// Improves slots [L,D,S].
    #[allow(clippy::fn_params_excessive_bools)]
    #[pyo3(signature = (start, *, trials, empties = true, restarts = 1, rounds = 1, quick = false, cool = false, links = None, seed = 0, time_limit = None, threads = None, alone = false, progress = None))]
    fn place<'py>(
        &mut self,
        py: Python<'py>,
        start: PyReadonlyArray3<'py, i32>,
        trials: u64,
        empties: bool,
        restarts: u64,
        rounds: u64,
        quick: bool,
        cool: bool,
        links: Option<Joined<'py>>,
        seed: u64,
        time_limit: Option<f64>,
        threads: Option<usize>,
        alone: bool,
        progress: Option<Bound<'py, PyAny>>,
    ) -> PyResult<(Bound<'py, PyArray3<i32>>, bool)> {
        let begin = self.begin(&start)?;
        let links = links_of(links.as_ref())?;
        let control = Control::new(deadline(time_limit));
        let effort = Effort { trials, empties, restarts, rounds, quick, cool, parallel: !alone };
        let layers = &mut self.layers;
        let work = || place(layers, begin, links, effort, seed, &control);
        let (placements, interrupted) = if alone {
            (super::alone(py, work)?, false)
        } else {
            watched(py, threads, &control, progress.as_ref(), work)?
        };
        Ok((self.end(py, &placements)?, interrupted))
    }

    /// Steps from slots [L,D,S] down, the one that gains most for a copy that is brought first.
    ///
    /// What each writes, twice: where in the flat slots and which expert [N,2]; copies brought, excess and change of the cost after
    /// it [N,3]; and whether it was interrupted.
    #[pyo3(signature = (start, running, *, max_moves = None, links = None, time_limit = None, threads = None))]
    fn descend<'py>(
        &mut self,
        py: Python<'py>,
        start: PyReadonlyArray3<'py, i32>,
        running: PyReadonlyArray3<'py, i32>,
        max_moves: Option<u32>,
        links: Option<Joined<'py>>,
        time_limit: Option<f64>,
        threads: Option<usize>,
    ) -> PyResult<Descent<'py>> {
        let begin = self.begin(&start)?;
        let running = self.begin(&running)?;
        let links = links_of(links.as_ref())?;
        let max_moves = max_moves.map_or(UNLIMITED, i64::from);
        let control = Control::new(deadline(time_limit));
        let layers = &self.layers;
        let (steps, interrupted) = watched(py, threads, &control, None, || {
            descend(layers, begin.clone(), &running, links, max_moves, &control)
        })?;
        let (mut places, mut experts, mut figures) = (Vec::new(), Vec::new(), Vec::new());
        for step in &steps {
            for (slot, expert) in step.written {
                let slots = &begin[step.layer];
                let device = slots.device(slot);
                let place =
                    (step.layer * self.sizes()[2] + device) * self.per_device + slot - slots.of(device).start;
                places.push(place as i64);
                experts.push(expert_id(expert));
            }
            figures.extend([step.moved as f64, step.excess, step.change]);
        }
        let n = steps.len();
        let (places, experts) = (array2(py, (n, 2), places)?, array2(py, (n, 2), experts)?);
        Ok((places, experts, array2(py, (n, 3), figures)?, interrupted))
    }

    /// Slots [L,D,S] to begin with: balanced on the sum of windows, or on every one; joined where tokens are divided.
    #[pyo3(signature = (*, windows = false, threads = None, alone = false))]
    fn construct<'py>(
        &mut self,
        py: Python<'py>,
        windows: bool,
        threads: Option<usize>,
        alone: bool,
    ) -> PyResult<Bound<'py, PyArray3<i32>>> {
        let construct = |(l, layer): (usize, &Layer)| {
            let slots = if windows { by_windows(layer) } else { on_sum(layer) };
            slots.map_err(|fault| fault.of(l))
        };
        let layers = &self.layers;
        let placements: Result<Vec<Slots>, Error> = if alone {
            super::alone(py, || layers.iter().enumerate().map(construct).collect())?
        } else {
            detached(py, threads, || layers.par_iter().enumerate().map(construct).collect())?
        };
        self.end(py, &placements?)
    }

    /// Slots [L,D,S] in which experts that lack copies have them, in empty slots or in place of copies to spare.
    ///
    /// A layer stays as it is in which an expert finds no slot.
    #[pyo3(signature = (start, *, threads = None))]
    fn complete<'py>(
        &mut self,
        py: Python<'py>,
        start: PyReadonlyArray3<'py, i32>,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyArray3<i32>>> {
        let begin = self.begin(&start)?;
        let layers = &self.layers;
        let work = || {
            let one = |(start, layer): (Slots, &Layer)| {
                let mut slots = start.clone();
                let is_complete = complete(&mut slots, &layer.site, &layer.load, false).is_ok();
                if is_complete { slots } else { start }
            };
            begin.into_par_iter().zip(layers).map(one).collect()
        };
        let placements: Vec<Slots> = detached(py, threads, work)?;
        self.end(py, &placements)
    }

    /// Whether devices are to hold experts [N,D,E] of some layers [N], by the fewest moves from running ones [L,D,E].
    #[pyo3(signature = (running, layers, *, full, threads = None))]
    fn nearest<'py>(
        &self,
        py: Python<'py>,
        running: PyReadonlyArray3<'py, bool>,
        layers: Vec<usize>,
        full: bool,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyArray3<bool>>> {
        let [l, e, d] = self.sizes();
        shaped("running", running.shape(), &[l, d, e])?;
        if let Some(layer) = layers.iter().find(|&&layer| layer >= l) {
            return Err(Error::shape("layers", format!("layers below {l}"), layer).into());
        }
        let running = contiguous(running.as_slice().ok())?;
        let control = Control::new(None);
        let one = |&layer: &usize| {
            let running = &running[layer * d * e..][..d * e];
            nearest(&self.layers[layer].site, running, full, &control).map_err(|fault| fault.of(layer))
        };
        let work = || layers.par_iter().map(one).collect::<Vec<_>>();
        let (placed, interrupted) = watched(py, threads, &control, None, work)?;
        if interrupted {
            return Err(PyKeyboardInterrupt::new_err(()));
        }
        // The first layer without a slot is named, whichever thread ends first.
        let holds: Result<Vec<_>, Error> = placed.into_iter().collect();
        array3(py, (layers.len(), d, e), holds?.concat())
    }
}

/// The busiest device over the mean of those that are left after every loss, and experts that are lost then [F,L].
type Measured<'py> = (Bound<'py, PyArray2<f64>>, Bound<'py, PyArray2<i64>>);

/// Measures single losses of slots [L,D,S] and loads [L,E], by the domain and time per token of every device [D].
#[pyfunction]
#[pyo3(signature = (slots, load, domain, time, *, divided = false, threads = None))]
pub(super) fn measure_losses<'py>(
    py: Python<'py>,
    slots: PyReadonlyArray3<'py, i32>,
    load: PyReadonlyArray2<'py, f64>,
    domain: Vec<u16>,
    time: Vec<f64>,
    divided: bool,
    threads: Option<usize>,
) -> PyResult<Measured<'py>> {
    let &[l, e] = load.shape() else { unreachable!("the array has two dimensions") };
    let (d, per_device) = (domain.len(), slots.shape()[2]);
    shaped("slots", slots.shape(), &[l, d, per_device])?;
    shaped("time", &[time.len()], &[d])?;
    fits("slots", d, per_device)?;
    let (load, slots) = (contiguous(load.as_slice().ok())?, contiguous(slots.as_slice().ok())?);
    let capacity = vec![per_device; d];
    let measure = |layer: usize| {
        let rows = &slots[layer * d * per_device..][..d * per_device];
        let slots = Slots::new(&capacity, e, &contents_of(rows, per_device, &capacity));
        SingleLosses::new(&slots, &load[layer * e..][..e], &domain, &time, divided)
    };
    let all: Vec<SingleLosses> = detached(py, threads, || (0..l).into_par_iter().map(measure).collect())?;
    let domains = domain.iter().max().map_or(0, |&last| usize::from(last) + 1);
    let by_loss = || (0..domains).flat_map(|lost| all.iter().map(move |losses| (losses, lost)));
    let imbalance = by_loss().map(|(losses, lost)| losses.imbalance[lost]).collect();
    let experts_lost = by_loss().map(|(losses, lost)| losses.experts_lost[lost]).collect();
    Ok((array2(py, (domains, l), imbalance)?, array2(py, (domains, l), experts_lost)?))
}

/// What the steps of a descent write, what is so after each, and whether it was interrupted.
type Descent<'py> = (Bound<'py, PyArray2<i64>>, Bound<'py, PyArray2<i32>>, Bound<'py, PyArray2<f64>>, bool);

#[pyfunction]
#[pyo3(signature = (load, capacity, time, *, trials = QUICK, rules = None))]
pub(super) fn replicate_experts<'py>(
    py: Python<'py>,
    load: PyReadonlyArray2<'py, f64>,
    capacity: PyReadonlyArray2<'py, i64>,
    time: PyReadonlyArray1<'py, f64>,
    trials: usize,
    rules: Option<PyRef<'py, LayerRules>>,
) -> PyResult<Bound<'py, PyArray3<i32>>> {
    let &[l, e] = load.shape() else { unreachable!("the array has two dimensions") };
    let (load, time) = (contiguous(load.as_slice().ok())?, contiguous(time.as_slice().ok())?);
    let widest = capacity.as_array().iter().copied().max().unwrap_or(0).max(0) as usize;
    room_for("slots and devices of layers", &[l, time.len(), widest + 4, size_of::<u64>()])?;
    let free = LayerRules::default();
    let rules = rules.as_deref().unwrap_or(&free);
    let (sites, per_device) = sites_of(&capacity, time, rules, [l, e])?;
    let placements = alone(py, || fill_layers(load, e, &sites, trials))??;
    let all = placements.iter().zip(&sites).map(|(slots, site)| (&slots.expert_in[..], site));
    slots_of(py, all, [time.len(), per_device])
}

/// Slots, and of every layer the time of the slowest device before and after, and copies brought.
type Adapted<'py> = (Bound<'py, PyArray3<i32>>, Vec<f64>, Vec<f64>, Vec<usize>);

#[pyfunction]
#[pyo3(signature = (load, slots, time, fresh, *, max_moves, dead_zone, deviations, steps, trials = QUICK, full = true, min_gain = 0.0))]
pub(super) fn adapt_slots<'py>(
    py: Python<'py>,
    load: PyReadonlyArray2<'py, f64>,
    slots: PyReadonlyArray3<'py, i32>,
    time: PyReadonlyArray1<'py, f64>,
    fresh: PyReadonlyArray1<'py, bool>,
    max_moves: usize,
    dead_zone: f64,
    deviations: f64,
    steps: usize,
    trials: usize,
    full: bool,
    min_gain: f64,
) -> PyResult<Adapted<'py>> {
    let &[l, e] = load.shape() else { unreachable!("the array has two dimensions") };
    let (d, per_device) = (time.shape()[0], slots.shape()[2]);
    shaped("slots", slots.shape(), &[l, d, per_device])?;
    shaped("fresh", fresh.shape(), &[l])?;
    fits("slots", d, per_device)?;
    let (load, time) = (contiguous(load.as_slice().ok())?, contiguous(time.as_slice().ok())?);
    let fresh = contiguous(fresh.as_slice().ok())?;
    let capacity = vec![per_device; d];
    let sites = vec![Site::plain(capacity.clone(), time.to_vec()); l];
    let rows = contiguous(slots.as_slice().ok())?.chunks_exact((d * per_device).max(1));
    let running: Vec<Vec<u16>> = rows.map(|rows| contents_of(rows, per_device, &capacity)).collect();
    let spending = Spending { max_moves, min_gain, dead_zone, deviations, devices: d };
    let effort = adapt::Effort { spending, steps, trials, full };
    let all = alone(py, || adapt_layers(load, e, &sites, &running, fresh, effort))??;
    let contents = all.iter().zip(&sites).map(|((contents, _), site)| (&contents[..], site));
    let slots = slots_of(py, contents, [d, per_device])?;
    let (before, after) = all.iter().map(|(_, [before, after])| (before.slowest, after.slowest)).unzip();
    Ok((slots, before, after, all.iter().map(|(_, [_, after])| after.moves).collect()))
}

#[pyfunction]
pub(super) fn match_devices<'py>(
    py: Python<'py>,
    packed: PyReadonlyArray3<'py, i32>,
    running: PyReadonlyArray3<'py, i32>,
    experts: usize,
) -> PyResult<Bound<'py, PyArray3<i32>>> {
    let &[_, d, per_device] = packed.shape() else { unreachable!("the array has three dimensions") };
    shaped("running", running.shape(), packed.shape())?;
    fits("packed", d, per_device)?;
    let site = Site::plain(vec![per_device; d], vec![1.0; d]);
    let (packed, running) = (contiguous(packed.as_slice().ok())?, contiguous(running.as_slice().ok())?);
    let slots = |rows| Slots::new(&site.capacity, experts, &contents_of(rows, per_device, &site.capacity));
    let size = (d * per_device).max(1);
    let layers = packed.chunks_exact(size).zip(running.chunks_exact(size));
    let matched = |(packed, running)| keep_devices(&slots(packed), &slots(running), &site.capacity);
    let all = alone(py, || layers.map(matched).collect::<Vec<_>>())?;
    slots_of(py, all.iter().map(|slots| (&slots.expert_in[..], &site)), [d, per_device])
}

#[pyfunction]
pub(super) fn match_best<'py>(
    py: Python<'py>,
    weight: PyReadonlyArray3<'py, i64>,
) -> PyResult<Bound<'py, PyArray2<i64>>> {
    let &[count, n, _] = weight.shape() else { unreachable!("the array has three dimensions") };
    shaped("weight", weight.shape(), &[count, n, n])?;
    let weight = contiguous(weight.as_slice().ok())?;
    let columns: Vec<i64> = alone(py, || {
        let matched = weight.chunks_exact((n * n).max(1)).flat_map(|weight| assign_max(weight, n));
        matched.map(|column: usize| i64::try_from(column).unwrap_or(i64::MAX)).collect()
    })?;
    array2(py, (count, n), columns)
}

#[pyfunction]
pub(super) fn keep_slots<'py>(
    py: Python<'py>,
    running: PyReadonlyArray3<'py, i32>,
    slots: PyReadonlyArray3<'py, i32>,
    experts: usize,
) -> PyResult<Bound<'py, PyArray3<i32>>> {
    let &[_, d, per_device] = slots.shape() else { unreachable!("the array has three dimensions") };
    shaped("running", running.shape(), slots.shape())?;
    fits("slots", d, per_device)?;
    let site = Site::plain(vec![per_device; d], vec![1.0; d]);
    let (running, slots) = (contiguous(running.as_slice().ok())?, contiguous(slots.as_slice().ok())?);
    let contents = |rows| contents_of(rows, per_device, &site.capacity);
    let size = (d * per_device).max(1);
    let layers = running.chunks_exact(size).zip(slots.chunks_exact(size));
    let keep = |(running, slots)| {
        Slots::new(&site.capacity, experts, &contents(running)).keep_slots(&contents(slots))
    };
    let all = alone(py, || layers.map(keep).collect::<Vec<_>>())?;
    slots_of(py, all.iter().map(|contents| (&contents[..], &site)), [d, per_device])
}

#[pyfunction]
#[pyo3(signature = (cost, moves, *, max_moves, dead_zone, deviations, devices, min_gain = 0.0))]
pub(super) fn spend_budget(
    cost: PyReadonlyArray2<'_, f64>,
    moves: PyReadonlyArray2<'_, i64>,
    max_moves: usize,
    dead_zone: f64,
    deviations: f64,
    devices: usize,
    min_gain: f64,
) -> PyResult<Vec<usize>> {
    let (cost, moves) = (cost.as_array(), moves.as_array());
    let choice = |(&cost, &moves): (&f64, &i64)| Choice {
        moves: usize::try_from(moves).unwrap_or(0),
        slowest: cost,
        cost,
    };
    let layers = cost.columns().into_iter().zip(moves.columns());
    let choices: Vec<Vec<Choice>> =
        layers.map(|(cost, moves)| cost.iter().zip(moves).map(choice).collect()).collect();
    let choices: Vec<&[Choice]> = choices.iter().map(|choices| &choices[..]).collect();
    caught(|| choose(&choices, Spending { max_moves, min_gain, dead_zone, deviations, devices }))
}
