//! Layers with copies of experts.

use numpy::{
    PyArray2, PyArray3, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use rayon::prelude::*;

use super::rules::LayerRules;
use super::{alone, array2, array3, caught, deadline, detached, shaped, sizes, slice, watched};
use crate::arrays::count_groups;
use crate::assignment::assign_max;
use crate::control::Control;
use crate::error::{Error, SLOTS, room_for};
use crate::layer::adapt::{self, adapt_layers, keep_devices};
use crate::layer::construct::{QUICK, complete, fill_by_sum, fill_by_windows, fill_layers, nearest};
use crate::layer::descend::{UNLIMITED, descend};
use crate::layer::terms::fanout;
use crate::layer::terms::losses::{Losses, SingleLosses};
use crate::layer::terms::lp_split;
use crate::layer::terms::reading::{Reading, Weights};
use crate::layer::terms::together::Pairs;
use crate::layer::terms::windows::{Measure, Windows};
use crate::layer::turns::{Effort, Heat, Links, place};
use crate::layer::{Choice, EMPTY, LANES, Layer, Site, Slots, Spending, Split, choose};

/// Returns the id of a slot's content, -1 for an empty slot.
fn expert_id(expert: u16) -> i32 {
    if expert == EMPTY { -1 } else { i32::from(expert) }
}

/// Returns the contents of a layer's slots, from ids [D,S] with -1 in empty slots; devices use the first slots of their rows.
fn read_contents(rows: &[i32], per_device: usize, capacity: &[usize]) -> Vec<u16> {
    let rows = rows.chunks_exact(per_device.max(1)).zip(capacity);
    let expert = |&e: &i32| u16::try_from(e).unwrap_or(EMPTY);
    rows.flat_map(|(row, &slots)| row[..slots].iter().map(expert)).collect()
}

/// Returns slots [L,D,S] with -1 in empty ones, from the contents and devices of every layer.
fn slots_array<'py, 'a>(
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

/// Transitions [L-1,E,E], and the cost of a transition between devices [D,D].
type LinkArrays<'py> = (PyReadonlyArray3<'py, u64>, PyReadonlyArray2<'py, f64>);

/// Returns the links between layers; none if no arrays are given.
fn read_links<'a>(arrays: Option<&'a LinkArrays<'_>>) -> PyResult<Links<'a>> {
    let Some((transitions, cost)) = arrays else { return Ok(Links { transitions: &[], cost: &[] }) };
    Ok(Links { transitions: slice(Some(transitions))?, cost: cost.as_slice()? })
}

/// Layers with copies: their windows and devices. Methods add the other prices.
#[pyclass(module = "moetuner._core")]
pub(super) struct Layers {
    layers: Vec<Layer>,
    per_device: usize,
}

/// Builds the sites of layers with slots [L,D], all devices in one node; returns them with the largest number of slots of a
/// device.
fn build_sites(
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
    check_slots("capacity", d, widest)?;
    room_for("slots", &[l, d, widest, size_of::<i32>()])?;
    Ok((sites, widest))
}

/// Refuses layers with more slots than 16 bits count, before memory for them is allocated.
fn check_slots(what: &'static str, devices: usize, widest: usize) -> PyResult<()> {
    if devices.saturating_mul(widest) <= SLOTS {
        return Ok(());
    }
    let rule = format!("at most {SLOTS} slots in a layer, all devices as wide as the widest");
    Err(Error::Shape { what, rule, got: format!("{devices} x {widest}") }.into())
}

impl Layers {
    /// Returns the numbers of layers, experts and devices.
    fn sizes(&self) -> [usize; 3] {
        let first = self.layers.first();
        [self.layers.len(), first.map_or(0, |layer| layer.experts), first.map_or(0, Layer::devices)]
    }

    /// Iterates over the layers, each with its part of a table whose first axis is layers.
    fn with_rows<'a, T>(&'a mut self, table: &'a [T]) -> impl Iterator<Item = (&'a mut Layer, &'a [T])> {
        let size = (table.len() / self.layers.len().max(1)).max(1);
        self.layers.iter_mut().zip(table.chunks_exact(size))
    }

    /// Builds the slots of every layer from ids [L,D,S].
    fn read_slots(&mut self, start: &PyReadonlyArray3<'_, i32>) -> PyResult<Vec<Slots>> {
        let [l, e, d] = self.sizes();
        let per_device = self.per_device;
        shaped("start", start.shape(), &[l, d, per_device])?;
        let start = start.as_slice()?;
        let slots = |(layer, rows): (&mut Layer, &[i32])| {
            let capacity = &layer.site.capacity;
            Slots::new(capacity, e, &read_contents(rows, per_device, capacity))
        };
        caught(|| self.with_rows(start).map(slots).collect())
    }

    /// Returns ids [L,D,S] from the slots of every layer.
    fn write_slots<'py>(&self, py: Python<'py>, placements: &[Slots]) -> PyResult<Bound<'py, PyArray3<i32>>> {
        let all = placements.iter().zip(&self.layers);
        let all = all.map(|(slots, layer)| (&slots.expert_in[..], &layer.site));
        slots_array(py, all, [self.sizes()[2], self.per_device])
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
        let no_rules = LayerRules::default();
        let rules = rules.as_deref().unwrap_or(&no_rules);
        let [w, layers, e] = sizes(load.shape());
        let (load, weight, d) = (load.as_slice()?, weight.as_array().to_vec(), node.len());
        let (sites, per_device) = build_sites(&capacity, &time, rules, [layers, e])?;
        // These tables are copies of the loads, and the windows of experts and of devices in the form of the search.
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

    /// Prices copies of experts on devices [L,E,D].
    fn price_copies(&mut self, cost: PyReadonlyArray3<'_, f64>) -> PyResult<()> {
        room_for("copy costs", &[cost.len(), size_of::<f64>()])?;
        for (layer, cost) in self.with_rows(cost.as_slice()?) {
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
            let (ids, counts) = (ids.as_slice()?, counts.as_slice()?);
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

    /// Prices the reading of weights and the rows at the busiest port, in tokens; rows are visits where these are `counted`.
    #[pyo3(signature = (*, base, expert, exposed, start, row, counted))]
    fn price_time(&mut self, base: f64, expert: f64, exposed: f64, start: f64, row: f64, counted: bool) {
        let weights = Weights { base, expert, exposed, start };
        for layer in &mut self.layers {
            layer.costs.reading = Reading::new(weights, &layer.windows, layer.experts, &layer.site);
            if counted || layer.costs.reading.is_some() || !layer.site.has_equal_speeds() {
                layer.costs.row = row;
            } else {
                // The slowest device also has the busiest port, so that a token costs a row, too.
                layer.windows.scale /= 1.0 + row;
            }
        }
    }

    /// Returns whether cost depends on the tokens of devices alone: neither reading weights nor rows have a price of their own.
    #[getter]
    fn has_tokens_alone(&self) -> bool {
        self.layers.iter().all(|layer| layer.costs.reading.is_none() && layer.costs.row == 0.0)
    }

    /// Prices pairs [L,E,E] on different devices; with the experts of a token `top_k` [L] they also estimate visits.
    #[pyo3(signature = (pairs, pair_cost, *, top_k = None))]
    fn price_pairs(
        &mut self,
        pairs: PyReadonlyArray3<'_, u64>,
        pair_cost: f64,
        top_k: Option<Vec<u32>>,
    ) -> PyResult<()> {
        let top_k = top_k.unwrap_or_else(|| vec![1; self.layers.len()]);
        shaped("top_k", &[top_k.len()], &[self.layers.len()])?;
        for ((layer, pairs), top_k) in self.with_rows(pairs.as_slice()?).zip(top_k) {
            let counts = pairs.iter().map(|&count| count as f32).collect();
            layer.costs.pairs = Some(Pairs::new(counts, top_k, pair_cost * layer.windows.scale));
        }
        Ok(())
    }

    /// Prices what the loss of a domain of devices [D] adds to another device, in mean loads of devices.
    fn price_losses(&mut self, domain: Vec<u16>, loss_cost: f64) -> PyResult<()> {
        shaped("domain", &[domain.len()], &[self.sizes()[2]])?;
        for layer in &mut self.layers {
            let cost = loss_cost * layer.windows.scale;
            layer.costs.losses = Some(Losses { domain: domain.clone(), cost });
        }
        Ok(())
    }

    /// Prices windows of load [W,L,E] with weights [W] whose tokens a dispatcher divides over copies by a linear programme.
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
        let (load, weight) = (load.as_slice()?, weight.as_array());
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let used =
                load.chunks_exact(experts).skip(l).step_by(layers).zip(&weight).filter(|row| *row.1 > 0.0);
            let scale = layer.windows.scale;
            let rows = used.flat_map(|(row, &weight)| row.iter().map(move |tokens| tokens * weight * scale));
            layer.costs.lp_split = Some(lp_split::Loads(rows.collect()));
        }
        Ok(())
    }

    /// Searches from slots [L,D,S]; returns better ones, and whether the search was interrupted.
    #[allow(clippy::fn_params_excessive_bools)]
    #[pyo3(signature = (start, *, trials, empties = true, restarts = 1, rounds = 1, quick = false, heat = None, chosen = None, links = None, seed = 0, time_limit = None, threads = None, alone = false, progress = None))]
    fn place<'py>(
        &mut self,
        py: Python<'py>,
        start: PyReadonlyArray3<'py, i32>,
        trials: u64,
        empties: bool,
        restarts: u64,
        rounds: u64,
        quick: bool,
        heat: Option<&str>,
        chosen: Option<Vec<usize>>,
        links: Option<LinkArrays<'py>>,
        seed: u64,
        time_limit: Option<f64>,
        threads: Option<usize>,
        alone: bool,
        progress: Option<Bound<'py, PyAny>>,
    ) -> PyResult<(Bound<'py, PyArray3<i32>>, bool)> {
        let slots = self.read_slots(&start)?;
        let links = read_links(links.as_ref())?;
        let control = Control::new(deadline(time_limit));
        let heat = match heat {
            None => Heat::InTurn,
            Some("warm") => Heat::Warm,
            Some("hot") => Heat::Hot,
            Some("cool") => Heat::Cool,
            Some(other) => return Err(Error::shape("heat", "warm, hot or cool", &other).into()),
        };
        if let Some(layer) = chosen.iter().flatten().find(|&&layer| layer >= self.layers.len()) {
            return Err(Error::shape("chosen", format!("layers below {}", self.layers.len()), &layer).into());
        }
        let effort = Effort { trials, empties, restarts, rounds, quick, heat, parallel: !alone };
        let layers = &mut self.layers;
        let work = || place(layers, slots, links, effort, chosen.as_deref(), seed, &control);
        let (placements, interrupted) = if alone {
            (super::alone(py, work)?, false)
        } else {
            watched(py, threads, &control, progress.as_ref(), work)?
        };
        Ok((self.write_slots(py, &placements)?, interrupted))
    }

    /// Descends from slots [L,D,S], always by the step that gains most per moved copy.
    ///
    /// Returns the two places in the flat slots that every step writes [N,2], and the experts that it writes there [N,2]; the
    /// moved copies, the excess and the change of cost after every step [N,3]; and whether the descent was interrupted.
    #[pyo3(signature = (start, running, *, max_moves = None, links = None, time_limit = None, threads = None))]
    fn descend<'py>(
        &mut self,
        py: Python<'py>,
        start: PyReadonlyArray3<'py, i32>,
        running: PyReadonlyArray3<'py, i32>,
        max_moves: Option<u32>,
        links: Option<LinkArrays<'py>>,
        time_limit: Option<f64>,
        threads: Option<usize>,
    ) -> PyResult<Descent<'py>> {
        let start = self.read_slots(&start)?;
        let running = self.read_slots(&running)?;
        let links = read_links(links.as_ref())?;
        let max_moves = max_moves.map_or(UNLIMITED, i64::from);
        let control = Control::new(deadline(time_limit));
        let layers = &self.layers;
        let (steps, interrupted) = watched(py, threads, &control, None, || {
            descend(layers, start.clone(), &running, links, max_moves, &control)
        })?;
        let (mut places, mut experts, mut figures) = (Vec::new(), Vec::new(), Vec::new());
        for step in &steps {
            for (slot, expert) in step.written {
                let slots = &start[step.layer];
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

    /// Constructs slots [L,D,S] to start a search from, balanced on the sum of windows or, with `windows`, on every window.
    #[pyo3(signature = (*, windows = false, threads = None, alone = false))]
    fn construct<'py>(
        &mut self,
        py: Python<'py>,
        windows: bool,
        threads: Option<usize>,
        alone: bool,
    ) -> PyResult<Bound<'py, PyArray3<i32>>> {
        let construct = |(l, layer): (usize, &Layer)| {
            let slots = if windows { fill_by_windows(layer) } else { fill_by_sum(layer) };
            slots.map_err(|fault| fault.of(l))
        };
        let layers = &self.layers;
        let placements: Result<Vec<Slots>, Error> = if alone {
            super::alone(py, || layers.iter().enumerate().map(construct).collect())?
        } else {
            detached(py, threads, || layers.par_iter().enumerate().map(construct).collect())?
        };
        self.write_slots(py, &placements?)
    }

    /// Gives copies to experts that lack them, in empty slots or in place of spare copies; returns slots [L,D,S].
    ///
    /// A layer in which an expert finds no slot stays as it is.
    #[pyo3(signature = (start, *, threads = None))]
    fn complete<'py>(
        &mut self,
        py: Python<'py>,
        start: PyReadonlyArray3<'py, i32>,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyArray3<i32>>> {
        let slots = self.read_slots(&start)?;
        let layers = &self.layers;
        let work = || {
            let complete_layer = |(start, layer): (Slots, &Layer)| {
                let mut slots = start.clone();
                let is_complete = complete(&mut slots, &layer.site, &layer.load, false).is_ok();
                if is_complete { slots } else { start }
            };
            slots.into_par_iter().zip(layers).map(complete_layer).collect()
        };
        self.write_slots(py, &detached::<Vec<Slots>>(py, threads, work)?)
    }

    /// Returns whether devices are to hold experts [N,D,E] of some layers [N], by the fewest moves from `running` [L,D,E].
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
        let running = running.as_slice()?;
        let control = Control::new(None);
        let find_nearest = |&layer: &usize| {
            let running = &running[layer * d * e..][..d * e];
            nearest(&self.layers[layer].site, running, full, &control).map_err(|fault| fault.of(layer))
        };
        let work = || layers.par_iter().map(find_nearest).collect::<Vec<_>>();
        let (placed, interrupted) = watched(py, threads, &control, None, work)?;
        if interrupted {
            return Err(PyKeyboardInterrupt::new_err(()));
        }
        // The error names the first layer without a slot, whichever thread ends first.
        let holds: Result<Vec<_>, Error> = placed.into_iter().collect();
        array3(py, (layers.len(), d, e), holds?.concat())
    }
}

/// The largest over the mean load of the remaining devices, and the number of experts lost, after the loss of every domain [F,L].
type Measured<'py> = (Bound<'py, PyArray2<f64>>, Bound<'py, PyArray2<i64>>);

/// Measures slots [L,D,S] after every loss of one domain, from loads [L,E], and domain and time per token of every device [D].
#[pyfunction]
#[pyo3(signature = (slots, load, domain, time, *, threads = None))]
pub(super) fn measure_losses<'py>(
    py: Python<'py>,
    slots: PyReadonlyArray3<'py, i32>,
    load: PyReadonlyArray2<'py, f64>,
    domain: Vec<u16>,
    time: Vec<f64>,
    threads: Option<usize>,
) -> PyResult<Measured<'py>> {
    let [l, e] = sizes(load.shape());
    let (d, per_device) = (domain.len(), slots.shape()[2]);
    shaped("slots", slots.shape(), &[l, d, per_device])?;
    shaped("time", &[time.len()], &[d])?;
    check_slots("slots", d, per_device)?;
    let (load, slots) = (load.as_slice()?, slots.as_slice()?);
    let capacity = vec![per_device; d];
    let measure = |layer: usize| {
        let rows = &slots[layer * d * per_device..][..d * per_device];
        let slots = Slots::new(&capacity, e, &read_contents(rows, per_device, &capacity));
        SingleLosses::new(&slots, &load[layer * e..][..e], &domain, &time)
    };
    let all: Vec<SingleLosses> = detached(py, threads, || (0..l).into_par_iter().map(measure).collect())?;
    let domains = count_groups(&domain);
    let by_loss = || (0..domains).flat_map(|lost| all.iter().map(move |losses| (losses, lost)));
    let imbalance = by_loss().map(|(losses, lost)| losses.imbalance[lost]).collect();
    let experts_lost = by_loss().map(|(losses, lost)| losses.experts_lost[lost]).collect();
    Ok((array2(py, (domains, l), imbalance)?, array2(py, (domains, l), experts_lost)?))
}

/// The places and experts that the steps of a descent write, figures after every step, and whether it was interrupted.
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
    let [l, e] = sizes(load.shape());
    let (load, time) = (load.as_slice()?, time.as_slice()?);
    let widest = capacity.as_array().iter().copied().max().unwrap_or(0).max(0) as usize;
    room_for("slots and devices of layers", &[l, time.len(), widest + 4, size_of::<u64>()])?;
    let no_rules = LayerRules::default();
    let rules = rules.as_deref().unwrap_or(&no_rules);
    let (sites, per_device) = build_sites(&capacity, time, rules, [l, e])?;
    let placements = alone(py, || fill_layers(load, e, &sites, trials))??;
    let all = placements.iter().zip(&sites).map(|(slots, site)| (&slots.expert_in[..], site));
    slots_array(py, all, [time.len(), per_device])
}

/// Slots [L,D,S]; times of the slowest device before and after, and moved copies, of every layer [L].
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
    let [l, e] = sizes(load.shape());
    let (d, per_device) = (time.shape()[0], slots.shape()[2]);
    shaped("slots", slots.shape(), &[l, d, per_device])?;
    shaped("fresh", fresh.shape(), &[l])?;
    check_slots("slots", d, per_device)?;
    let (load, time, fresh) = (load.as_slice()?, time.as_slice()?, fresh.as_slice()?);
    let capacity = vec![per_device; d];
    let sites = vec![Site::plain(capacity.clone(), time.to_vec()); l];
    let rows = slots.as_slice()?.chunks_exact((d * per_device).max(1));
    let running: Vec<Vec<u16>> = rows.map(|rows| read_contents(rows, per_device, &capacity)).collect();
    let spending = Spending { max_moves, min_gain, dead_zone, deviations, devices: d };
    let effort = adapt::Effort { spending, steps, trials, full };
    let all = alone(py, || adapt_layers(load, e, &sites, &running, fresh, effort))??;
    let contents = all.iter().zip(&sites).map(|((contents, _), site)| (&contents[..], site));
    let slots = slots_array(py, contents, [d, per_device])?;
    let (before, after) = all.iter().map(|(_, [before, after])| (before.slowest, after.slowest)).unzip();
    Ok((slots, before, after, all.iter().map(|(_, [_, after])| after.moves).collect()))
}

/// Returns slots [L,D,S] that `work` makes of those of every layer and of its running ones; it gets their capacity first.
fn map_layers<'py>(
    py: Python<'py>,
    slots: &PyReadonlyArray3<'py, i32>,
    running: &PyReadonlyArray3<'py, i32>,
    work: impl Fn(&[usize], &[u16], &[u16]) -> Vec<u16> + Sync,
) -> PyResult<Bound<'py, PyArray3<i32>>> {
    let [_, d, per_device] = sizes(slots.shape());
    shaped("running", running.shape(), slots.shape())?;
    check_slots("slots", d, per_device)?;
    let site = Site::plain(vec![per_device; d], vec![1.0; d]);
    let (slots, running, size) = (slots.as_slice()?, running.as_slice()?, (d * per_device).max(1));
    let contents = |rows| read_contents(rows, per_device, &site.capacity);
    let layers = slots.chunks_exact(size).zip(running.chunks_exact(size));
    let layer = |(slots, running)| work(&site.capacity, &contents(slots), &contents(running));
    let all = alone(py, || layers.map(layer).collect::<Vec<_>>())?;
    slots_array(py, all.iter().map(|contents| (&contents[..], &site)), [d, per_device])
}

#[pyfunction]
pub(super) fn match_devices<'py>(
    py: Python<'py>,
    packed: PyReadonlyArray3<'py, i32>,
    running: PyReadonlyArray3<'py, i32>,
    experts: usize,
) -> PyResult<Bound<'py, PyArray3<i32>>> {
    map_layers(py, &packed, &running, |capacity, packed, running| {
        let slots = |contents| Slots::new(capacity, experts, contents);
        keep_devices(&slots(packed), &slots(running), capacity).expert_in
    })
}

#[pyfunction]
pub(super) fn match_best<'py>(
    py: Python<'py>,
    weight: PyReadonlyArray3<'py, i64>,
) -> PyResult<Bound<'py, PyArray2<i64>>> {
    let [count, n, _] = sizes(weight.shape());
    shaped("weight", weight.shape(), &[count, n, n])?;
    let weight = weight.as_slice()?;
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
    map_layers(py, &slots, &running, |capacity, slots, running| {
        Slots::new(capacity, experts, running).keep_slots(slots)
    })
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
