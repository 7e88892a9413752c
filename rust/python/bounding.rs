//! Bounds, and the certificates that prove them.

use std::sync::atomic::Ordering;

use numpy::{
    IntoPyArray, PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3, PyUntypedArrayMethods,
};
use pyo3::prelude::*;

use super::{contiguous, deadline, detached, watched};
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
#[pyo3(signature = (load, transitions, cap, devices, lambda_, columns, multipliers, cuts, choices, contents,
                    *, threads = None))]
pub(super) fn verify_bound<'py>(
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
    threads: Option<usize>,
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
