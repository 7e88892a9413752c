//! Lower bounds, and the certificates that prove them.

use numpy::{
    IntoPyArray, PyArray1, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3,
    PyUntypedArrayMethods,
};
use pyo3::prelude::*;

use super::{deadline, detached, sizes, watched};
use crate::bound::{Certificate, Instance, Limits, visits};
use crate::control::Control;

/// Lambda, columns, multipliers of the cuts, cuts, choices, and contents of a certificate, as flat arrays.
type CertificateArrays<'py> = (
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<i32>>,
    Bound<'py, PyArray1<u8>>,
    Bound<'py, PyArray1<f64>>,
);

/// Load [L,E], transitions [L-1,E,E], caps [L] and the number of devices.
type Problem<'py> =
    (PyReadonlyArray2<'py, u64>, PyReadonlyArray3<'py, u64>, PyReadonlyArray1<'py, u64>, usize);

/// Builds the instance of a problem.
fn build_instance<'a>((load, transitions, cap, devices): &'a Problem<'_>) -> PyResult<Instance<'a>> {
    let ([layers, experts], devices) = (sizes(load.shape()), *devices);
    let (load, transitions, cap) = (load.as_slice()?, transitions.as_slice()?, cap.as_slice()?);
    Ok(Instance { layers, experts, devices, transitions, load, cap })
}

/// Proven cost, name of the bound, iterations, why it ended, whether it was interrupted, and the certificate.
type Bounded<'py> = (u64, &'static str, usize, &'static str, bool, CertificateArrays<'py>);

#[pyfunction]
#[pyo3(signature = (problem, *, iterations, target = None, gap = 0.0, time_limit = None, threads = None,
                    progress = None))]
pub(super) fn bound<'py>(
    py: Python<'py>,
    problem: Problem<'py>,
    iterations: usize,
    target: Option<u64>,
    gap: f64,
    time_limit: Option<f64>,
    threads: Option<usize>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Bounded<'py>> {
    let (instance, control) = (build_instance(&problem)?, Control::new(deadline(time_limit)));
    let limits = Limits { iterations, target, gap, control: &control };
    let work = || crate::bound::bound(&instance, &limits, |cost| control.offer_bound(cost));
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

#[pyfunction]
#[pyo3(signature = (problem, certificate, *, threads = None))]
pub(super) fn verify_bound<'py>(
    py: Python<'py>,
    problem: Problem<'py>,
    certificate: CertificateArrays<'py>,
    threads: Option<usize>,
) -> PyResult<u64> {
    let instance = build_instance(&problem)?;
    let (lambda, columns, multipliers, cuts, choices, contents) = certificate;
    let certificate = Certificate {
        lambda: lambda.to_vec()?,
        columns: columns.to_vec()?,
        multipliers: multipliers.to_vec()?,
        cuts: cuts.to_vec()?,
        choices: choices.to_vec()?,
        contents: contents.to_vec()?,
    };
    Ok(detached(py, threads, || crate::bound::verify(&instance, &certificate))??)
}

/// Expert sets of every layer (ids [N,K] and counts [N]), load [L,E], caps [L], and slots of every device [L,D].
type VisitsProblem<'py> = (
    Vec<(PyReadonlyArray2<'py, u16>, PyReadonlyArray1<'py, u64>)>,
    PyReadonlyArray2<'py, u64>,
    PyReadonlyArray1<'py, u64>,
    PyReadonlyArray2<'py, usize>,
);

/// Builds the layers of a problem of visits.
fn build_layers<'a>((sets, load, cap, slots): &'a VisitsProblem<'_>) -> PyResult<Vec<visits::Layer<'a>>> {
    let (experts, devices, cap) = (load.shape()[1], slots.shape()[1], cap.as_slice()?);
    let (load, slots) = (load.as_slice()?, slots.as_slice()?);
    let mut layers = Vec::with_capacity(sets.len());
    for (l, (ids, counts)) in sets.iter().enumerate() {
        layers.push(visits::Layer {
            ids: ids.as_slice()?,
            counts: counts.as_slice()?,
            top_k: ids.shape()[1],
            load: &load[l * experts..][..experts],
            cap: cap[l],
            slots: &slots[l * devices..][..devices],
        });
    }
    Ok(layers)
}

/// Proven visits of every layer [L], prices [L,E], and whether it was interrupted.
type BoundedVisits<'py> = (Bound<'py, PyArray1<u64>>, Bound<'py, PyArray1<f64>>, bool);

#[pyfunction]
#[pyo3(signature = (problem, start, *, rounds, work, gap = 0.0, time_limit = None, threads = None, progress = None))]
pub(super) fn bound_visits<'py>(
    py: Python<'py>,
    problem: VisitsProblem<'py>,
    start: PyReadonlyArray2<'py, u16>,
    rounds: usize,
    work: f64,
    gap: f64,
    time_limit: Option<f64>,
    threads: Option<usize>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Option<BoundedVisits<'py>>> {
    let (layers, start) = (build_layers(&problem)?, start.as_slice()?);
    let control = Control::new(deadline(time_limit));
    let limits = visits::Limits { rounds, work, gap, control: &control };
    if !visits::is_tractable(&layers) {
        return Ok(None);
    }
    let work = || visits::bound(&layers, start, &limits, |visits| control.offer_bound(visits));
    let ((visits, prices), interrupted) = watched(py, threads, &control, progress.as_ref(), work)?;
    Ok(Some((visits.into_pyarray(py), prices.into_pyarray(py), interrupted)))
}

#[pyfunction]
#[pyo3(signature = (problem, prices, *, threads = None))]
pub(super) fn verify_visits<'py>(
    py: Python<'py>,
    problem: VisitsProblem<'py>,
    prices: PyReadonlyArray1<'py, f64>,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray1<u64>>> {
    let (layers, prices) = (build_layers(&problem)?, prices.as_slice()?);
    Ok(detached(py, threads, || visits::verify(&layers, prices))??.into_pyarray(py))
}
