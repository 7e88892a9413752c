//! The Python module `moetuner._core`: views in, one call, arrays out. The only file that knows pyo3.

use numpy::ndarray::Array3;
use numpy::{IntoPyArray, PyArray3, PyReadonlyArray3, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::error::Error;
use crate::statistics::{Counter, Wanted};
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

/// Runs `work` without the interpreter lock, in a pool of `threads` threads where a number is given.
fn detached<T: Send>(py: Python<'_>, threads: Option<usize>, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    py.detach(|| match threads {
        None => Ok(work()),
        Some(n) => {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n.max(1)).build();
            let pool = pool.map_err(|e| PyValueError::new_err(format!("threads: {e}")))?;
            Ok(pool.install(work))
        }
    })
}

fn array3<'py, T: numpy::Element>(
    py: Python<'py>,
    shape: (usize, usize, usize),
    data: Vec<T>,
) -> PyResult<Bound<'py, PyArray3<T>>> {
    let array = Array3::from_shape_vec(shape, data).map_err(|e| PyValueError::new_err(e.to_string()))?;
    Ok(array.into_pyarray(py))
}

#[pyfunction]
#[pyo3(signature = (expert_ids, num_experts, first_token = 0))]
fn validate(py: Python<'_>, expert_ids: Ids<'_>, num_experts: usize, first_token: u64) -> PyResult<()> {
    let shape = match &expert_ids {
        Ids::U8(array) => array.shape().to_vec(),
        Ids::U16(array) => array.shape().to_vec(),
    };
    let routing = Routing::new(shape[1], num_experts, shape[2])?;
    with_ids!(expert_ids, ids => Ok(detached(py, None, || crate::trace::validate(ids, routing, first_token))??))
}

/// Counts a trace shard by shard.
#[pyclass(module = "moetuner._core")]
struct StatisticsCounter {
    routing: Routing,
    counter: Option<Counter>,
}

/// tokens, load [W,L,E], transitions [L-1,E,E], coactivation [L,E,E]
type Counts<'py> = (
    u64,
    Bound<'py, PyArray3<u64>>,
    Option<Bound<'py, PyArray3<u64>>>,
    Option<Bound<'py, PyArray3<u64>>>,
);

#[pymethods]
impl StatisticsCounter {
    #[new]
    #[pyo3(signature = (layers, num_experts, top_k, *, window = None, transitions = true, coactivation = true))]
    fn new(
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
        let counter = Counter::new(routing, window, Wanted { transitions, coactivation });
        Ok(Self { routing, counter: Some(counter) })
    }

    #[pyo3(signature = (expert_ids, threads = None))]
    fn push(&mut self, py: Python<'_>, expert_ids: Ids<'_>, threads: Option<usize>) -> PyResult<()> {
        let counter = self.counter.as_mut().ok_or_else(finished)?;
        with_ids!(expert_ids, ids => Ok(detached(py, threads, || counter.push(ids))??))
    }

    fn finish<'py>(&mut self, py: Python<'py>) -> PyResult<Counts<'py>> {
        let counter = self.counter.take().ok_or_else(finished)?;
        let counts = py.detach(|| counter.finish());
        let Routing { layers, experts, .. } = self.routing;
        let table = |n: usize, data: Option<Vec<u64>>| {
            data.map(|data| array3(py, (n, experts, experts), data)).transpose()
        };
        Ok((
            counts.tokens,
            array3(py, (counts.windows, layers, experts), counts.load)?,
            table(layers - 1, counts.transitions)?,
            table(layers, counts.coactivation)?,
        ))
    }
}

fn finished() -> PyErr {
    PyValueError::new_err("the counter is finished; make a new one")
}

/// moetuner's native core.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::{StatisticsCounter, validate};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
