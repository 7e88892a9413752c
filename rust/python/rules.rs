//! Rules of placements as Python passes them: one object for all layers.

use numpy::{PyReadonlyArray2, PyReadonlyArray3, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::{shaped, sizes, slice};
use crate::layer::construct;
use crate::layer::{Rules, Site};

/// The rules that placements of all layers keep, whatever they cost.
#[pyclass(module = "moetuner._core", name = "Rules", frozen)]
#[derive(Default)]
pub(super) struct LayerRules {
    shape: Option<[usize; 3]>,
    forbidden: Vec<bool>,
    pinned: Vec<bool>,
    is_single: bool,
    /// Copies that every expert must have, and the failure domain of every device [D]; with domains, copies must be in two.
    min_copies: u32,
    domain: Vec<u16>,
    /// Largest load of a device in every layer [L], of the loads [L,E] that count for it.
    caps: Vec<f64>,
    load: Vec<f64>,
}

#[pymethods]
impl LayerRules {
    #[new]
    #[pyo3(signature = (*, copies = true, min_copies = 1, domain = vec![], forbidden = None, pinned = None, caps = None, load = None))]
    fn new(
        copies: bool,
        min_copies: u32,
        domain: Vec<u16>,
        forbidden: Option<PyReadonlyArray3<'_, bool>>,
        pinned: Option<PyReadonlyArray3<'_, bool>>,
        caps: Option<Vec<f64>>,
        load: Option<PyReadonlyArray2<'_, f64>>,
    ) -> PyResult<Self> {
        let mut shape = None;
        for (what, table) in [("forbidden", &forbidden), ("pinned", &pinned)] {
            let Some(table) = table else { continue };
            shaped(what, table.shape(), shape.get_or_insert(sizes(table.shape())))?;
        }
        let caps = caps.unwrap_or_default();
        let load = load.as_ref().map_or(Ok(&[][..]), |load| load.as_slice())?.to_vec();
        Ok(Self {
            shape,
            forbidden: slice(forbidden.as_ref())?.to_vec(),
            pinned: slice(pinned.as_ref())?.to_vec(),
            is_single: !copies,
            min_copies,
            domain,
            caps,
            load,
        })
    }
}

#[pyfunction]
pub(super) fn find_shortage(
    forbidden: PyReadonlyArray2<'_, bool>,
    capacity: Vec<usize>,
) -> PyResult<Option<(usize, Vec<usize>)>> {
    let [experts, devices] = sizes(forbidden.shape());
    shaped("forbidden", &[experts, devices], &[experts, capacity.len()])?;
    let table = forbidden.as_slice()?.to_vec();
    let rules = Rules { forbidden: table, ..Rules::default() };
    let site = Site { rules, ..Site::plain(capacity, vec![1.0; devices]) };
    Ok(construct::find_shortage(&site, experts))
}

impl LayerRules {
    /// Refuses tables that do not have so many layers, experts and devices.
    pub(super) fn check(&self, sizes: [usize; 3]) -> PyResult<()> {
        self.shape.map_or(Ok(()), |shape| shaped("rules", &shape, &sizes))?;
        let capped = sizes[0] * usize::from(!self.caps.is_empty());
        shaped("caps", &[self.caps.len(), self.load.len()], &[capped, capped * sizes[1]])
    }

    /// Returns the rules of a layer.
    pub(super) fn of_layer(&self, layer: usize, [experts, devices]: [usize; 2]) -> Rules {
        let size = experts * devices;
        let table =
            |of_all: &[bool]| of_all.get(layer * size..(layer + 1) * size).unwrap_or_default().to_vec();
        let plain = Rules::default();
        Rules {
            forbidden: table(&self.forbidden),
            pinned: table(&self.pinned),
            min_copies: self.min_copies.max(plain.min_copies),
            domain: self.domain.clone(),
            max_copies: if self.is_single { 1 } else { plain.max_copies },
            cap: self.caps.get(layer).copied().unwrap_or(plain.cap),
        }
    }

    /// Returns the loads of a layer `[E]` that count for its cap, if it has one.
    pub(super) fn capped_load(&self, layer: usize, experts: usize) -> Option<&[f64]> {
        self.load.get(layer * experts..(layer + 1) * experts)
    }
}
