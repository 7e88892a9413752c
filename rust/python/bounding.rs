//! Bounds, and the certificates that prove them.

use numpy::{
    IntoPyArray, PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3, PyUntypedArrayMethods,
};
use pyo3::prelude::*;

use super::{contiguous, deadline, detached, watched};
use crate::bound::visits;
use crate::control::Control;

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
pub(super) fn bound<'py>(
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
    let control = Control::new(deadline(time_limit));
    let limits = crate::bound::Limits { iterations, target, gap, control: &control };
    let work = || crate::bound::bound(&instance, &limits, |cost| control.proven(cost));
    let (bound, interrupted) = watched(py, threads, &control, progress.as_ref(), work)?;
    let bound = bound?;
    let proof = bound.certificate;
    let arrays = (
        proof.lambda.into_pyarray(py),
        proof.columns.into_pyarray(py),
        proof.multipliers.into_pyarray(py),
        proof.cuts.into_pyarray(py),
        proof.choices.into_pyarray(py),
        proof.contents.into_pyarray(py),
    );
    Ok((bound.cost, bound.source, bound.iterations, bound.end, interrupted, arrays))
}

/// The same arrays, read.
type ReadCertificate<'py> = (
    PyReadonlyArray1<'py, f64>,
    PyReadonlyArray1<'py, f64>,
    PyReadonlyArray1<'py, f64>,
    PyReadonlyArray1<'py, i32>,
    PyReadonlyArray1<'py, u8>,
    PyReadonlyArray1<'py, f64>,
);

#[pyfunction]
#[pyo3(signature = (load, transitions, cap, devices, certificate, *, threads = None))]
pub(super) fn verify_bound<'py>(
    py: Python<'py>,
    load: PyReadonlyArray2<'py, u64>,
    transitions: PyReadonlyArray3<'py, u64>,
    cap: PyReadonlyArray1<'py, u64>,
    devices: usize,
    certificate: ReadCertificate<'py>,
    threads: Option<usize>,
) -> PyResult<u64> {
    let instance = bound_instance(&load, &transitions, &cap, devices)?;
    let (lambda, columns, multipliers, cuts, choices, contents) = certificate;
    let certificate = crate::bound::Certificate {
        lambda: lambda.as_slice()?.to_vec(),
        columns: columns.as_slice()?.to_vec(),
        multipliers: multipliers.as_slice()?.to_vec(),
        cuts: cuts.as_slice()?.to_vec(),
        choices: choices.as_slice()?.to_vec(),
        contents: contents.as_slice()?.to_vec(),
    };
    Ok(detached(py, threads, || crate::bound::verify(&instance, &certificate))??)
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

/// Expert sets of a layer: ids [N,K] and counts [N].
type Sets<'py> = Vec<(PyReadonlyArray2<'py, u16>, PyReadonlyArray1<'py, u64>)>;

/// Proven visits of every layer [L], prices [L,E], and whether it was interrupted.
type BoundedVisits<'py> = (Bound<'py, PyArray1<u64>>, Bound<'py, PyArray1<f64>>, bool);

#[pyfunction]
#[pyo3(signature = (sets, load, cap, slots, start, *, rounds, work, gap = 0.0, time_limit = None, threads = None,
                    progress = None))]
pub(super) fn bound_visits<'py>(
    py: Python<'py>,
    sets: Sets<'py>,
    load: PyReadonlyArray2<'py, u64>,
    cap: PyReadonlyArray1<'py, u64>,
    slots: PyReadonlyArray2<'py, u64>,
    start: PyReadonlyArray2<'py, u16>,
    rounds: usize,
    work: f64,
    gap: f64,
    time_limit: Option<f64>,
    threads: Option<usize>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Option<BoundedVisits<'py>>> {
    let slots = slots_by_layer(&slots)?;
    let layers = visited_layers(&sets, &load, &cap, &slots)?;
    let start = contiguous(start.as_slice().ok())?;
    let control = Control::new(deadline(time_limit));
    let limits = visits::Limits { rounds, work, gap, control: &control };
    if !visits::is_tractable(&layers) {
        return Ok(None);
    }
    let work = || visits::bound(&layers, start, &limits, |visits| control.proven(visits));
    let ((visits, prices), interrupted) = watched(py, threads, &control, progress.as_ref(), work)?;
    Ok(Some((visits.into_pyarray(py), prices.into_pyarray(py), interrupted)))
}

#[pyfunction]
#[pyo3(signature = (sets, load, cap, slots, prices, *, threads = None))]
pub(super) fn verify_visits<'py>(
    py: Python<'py>,
    sets: Sets<'py>,
    load: PyReadonlyArray2<'py, u64>,
    cap: PyReadonlyArray1<'py, u64>,
    slots: PyReadonlyArray2<'py, u64>,
    prices: PyReadonlyArray1<'py, f64>,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray1<u64>>> {
    let slots = slots_by_layer(&slots)?;
    let layers = visited_layers(&sets, &load, &cap, &slots)?;
    let prices = contiguous(prices.as_slice().ok())?;
    let proven = detached(py, threads, || visits::verify(&layers, prices))??;
    Ok(proven.into_pyarray(py))
}

fn slots_by_layer(slots: &PyReadonlyArray2<'_, u64>) -> PyResult<Vec<Vec<usize>>> {
    let devices = slots.shape()[1];
    let rows = contiguous(slots.as_slice().ok())?.chunks(devices.max(1));
    Ok(rows.map(|row| row.iter().map(|&slots| slots as usize).collect()).collect())
}

fn visited_layers<'a>(
    sets: &'a Sets<'_>,
    load: &'a PyReadonlyArray2<'_, u64>,
    cap: &'a PyReadonlyArray1<'_, u64>,
    slots: &'a [Vec<usize>],
) -> PyResult<Vec<visits::Layer<'a>>> {
    let experts = load.shape()[1];
    let cap = contiguous(cap.as_slice().ok())?;
    let load = contiguous(load.as_slice().ok())?;
    let layer = |(l, (ids, counts)): (usize, &'a (PyReadonlyArray2<'_, u16>, PyReadonlyArray1<'_, u64>))| {
        Ok(visits::Layer {
            ids: contiguous(ids.as_slice().ok())?,
            counts: contiguous(counts.as_slice().ok())?,
            top_k: ids.shape()[1],
            load: &load[l * experts..][..experts],
            cap: cap[l],
            slots: &slots[l],
        })
    };
    sets.iter().enumerate().map(layer).collect()
}
