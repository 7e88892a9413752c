//! Lines of JSON with expert ids.

use numpy::{IntoPyArray, PyArray1, PyArray2};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::{alone, array2};
use crate::lines::{Keys, SIZES, scan};

/// End, line ends, ids, table [lines, columns], texts, and the rule that the next line breaks.
type Lines<'py> =
    (usize, usize, Bound<'py, PyArray1<u16>>, Bound<'py, PyArray2<i64>>, Vec<String>, Option<String>);

#[pyfunction]
pub(super) fn scan_lines<'py>(
    py: Python<'py>,
    text: Bound<'py, PyBytes>,
    start: usize,
    arrays: Vec<(String, usize)>,
    integers: Vec<String>,
    texts: Vec<String>,
) -> PyResult<Lines<'py>> {
    let bytes = text.as_bytes();
    if start > bytes.len() || arrays.iter().any(|(_, dimensions)| !(2..=3).contains(dimensions)) {
        return Err(PyValueError::new_err("start must be in the text, dimensions must be 2 or 3"));
    }
    let keys = Keys { arrays, integers, texts };
    let lines = alone(py, || scan(bytes, start, &keys))?;
    let width = SIZES + keys.integers.len() + keys.texts.len();
    let table = array2(py, (lines.table.len() / width, width), lines.table)?;
    Ok((lines.end, lines.ends, lines.ids.into_pyarray(py), table, lines.texts, lines.refused))
}
