//! Routed expert ids, `[tokens, layers, top_k]`, and the one check that makes them safe to count.

use rayon::prelude::*;

use crate::error::{Error, Result};

/// The integer types that a trace may hold expert ids in.
pub trait ExpertId: Copy + Eq + Ord + Send + Sync + 'static {
    /// The id as a table index.
    fn index(self) -> usize;
}

impl ExpertId for u8 {
    #[inline(always)]
    fn index(self) -> usize {
        usize::from(self)
    }
}

impl ExpertId for u16 {
    #[inline(always)]
    fn index(self) -> usize {
        usize::from(self)
    }
}

/// The sizes of a model's routing, which every shard of its trace shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Routing {
    /// Mixture-of-Experts layers, L.
    pub layers: usize,
    /// Experts per layer, E.
    pub experts: usize,
    /// Experts per token and layer, K.
    pub top_k: usize,
}

impl Routing {
    /// Sizes that a trace can have: at least one layer and one expert, `1 <= K <= E`, ids within 16 bits.
    pub fn new(layers: usize, experts: usize, top_k: usize) -> Result<Self> {
        let shape = |what, rule: &str, found: usize| {
            Err(Error::Shape { what, rule: rule.into(), found: found.to_string() })
        };
        if layers == 0 {
            return shape("expert_ids", "at least one layer", layers);
        }
        if experts == 0 || experts > 1 << 16 {
            return shape("num_experts", "a value from 1 to 65536", experts);
        }
        if top_k == 0 || top_k > experts {
            let rule = format!("a top-k from 1 to num_experts ({experts})");
            return Err(Error::Shape { what: "expert_ids", rule, found: top_k.to_string() });
        }
        Ok(Self { layers, experts, top_k })
    }

    /// Ids per token.
    #[must_use]
    pub fn row(&self) -> usize {
        self.layers * self.top_k
    }
}

/// Rows per task: large enough to hide the scheduling, small enough to share between threads.
const ROWS_PER_TASK: usize = 1 << 16;

/// Checks every id of a shard: in range, and no expert twice in one token and layer.
///
/// `first_token` is the shard's position in its trace; it is only used to name a faulty token.
/// The error is always that of the first faulty token and layer.
pub fn validate<I: ExpertId>(ids: &[I], routing: Routing, first_token: u64) -> Result<()> {
    if !ids.len().is_multiple_of(routing.row()) {
        let rule = format!("whole tokens of {} layers x {} ids", routing.layers, routing.top_k);
        return Err(Error::Shape { what: "expert_ids", rule, found: format!("{} ids", ids.len()) });
    }
    let k = routing.top_k;
    let faulty = ids
        .par_chunks(ROWS_PER_TASK * k)
        .enumerate()
        .filter_map(|(task, rows)| first_fault(rows, routing).map(|row| task * ROWS_PER_TASK + row))
        .min();
    match faulty {
        None => Ok(()),
        Some(row) => Err(describe(&ids[row * k..][..k], row, routing, first_token)),
    }
}

/// The first row (token and layer) that breaks a rule.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx2+bmi2+popcnt",
    "x86_64+avx2+bmi2+popcnt"
))]
fn first_fault<I: ExpertId>(rows: &[I], routing: Routing) -> Option<usize> {
    // A constant K lets the comparisons of a row unroll.
    match routing.top_k {
        1 => first_fault_of::<I, 1>(rows, routing.experts),
        2 => first_fault_of::<I, 2>(rows, routing.experts),
        4 => first_fault_of::<I, 4>(rows, routing.experts),
        6 => first_fault_of::<I, 6>(rows, routing.experts),
        8 => first_fault_of::<I, 8>(rows, routing.experts),
        k => rows.chunks_exact(k).position(|row| {
            row.iter().enumerate().any(|(i, id)| id.index() >= routing.experts || row[..i].contains(id))
        }),
    }
}

#[inline(always)]
fn first_fault_of<I: ExpertId, const K: usize>(rows: &[I], experts: usize) -> Option<usize> {
    const MANY: usize = 64;
    let faulty = |row: &[I; K]| {
        let mut bad = false;
        for i in 0..K {
            bad |= row[i].index() >= experts;
            for j in 0..i {
                bad |= row[i] == row[j];
            }
        }
        bad
    };
    // Look at many rows at once, ids of one position side by side, and for the exact row only where there is a fault.
    let many_faulty = |block: &[[I; K]; MANY]| {
        let columns: [[I; MANY]; K] = std::array::from_fn(|i| std::array::from_fn(|row| block[row][i]));
        let mut bad = [false; MANY];
        for i in 0..K {
            for row in 0..MANY {
                bad[row] |= columns[i][row].index() >= experts;
            }
            for j in 0..i {
                for row in 0..MANY {
                    bad[row] |= columns[i][row] == columns[j][row];
                }
            }
        }
        bad.contains(&true)
    };
    let (rows, _) = rows.as_chunks::<K>();
    let (blocks, rest) = rows.as_chunks::<MANY>();
    match blocks.iter().position(many_faulty) {
        Some(at) => blocks[at].iter().position(faulty).map(|row| at * MANY + row),
        None => rest.iter().position(faulty).map(|row| blocks.len() * MANY + row),
    }
}

fn describe<I: ExpertId>(ids: &[I], row: usize, routing: Routing, first_token: u64) -> Error {
    let token = first_token + (row / routing.layers) as u64;
    let layer = row % routing.layers;
    let Routing { experts, .. } = routing;
    match ids.iter().find(|id| id.index() >= experts) {
        Some(id) => Error::ExpertOutOfRange { token, layer, expert: id.index(), experts },
        None => {
            let twice = ids.iter().enumerate().find(|(i, id)| ids[..*i].contains(id));
            let expert = twice.map_or(0, |(_, id)| id.index());
            Error::ExpertTwice { token, layer, expert }
        }
    }
}
