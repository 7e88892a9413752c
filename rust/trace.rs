//! Routed expert ids, `[tokens, layers, top_k]`, and the one check that makes them safe to count.

use rayon::prelude::*;

use crate::error::{Error, Result};

/// The integer types that a trace may hold expert ids in.
pub trait ExpertId: Copy + Eq + Ord + Send + Sync + 'static {
    /// Width of the type.
    const BITS: usize;
    /// Returns the id as a table index.
    fn index(self) -> usize;
    /// Packs the ids of a row into a word, the first one lowest; they must fit.
    fn word<const K: usize>(row: &[Self; K]) -> u64;
}

impl ExpertId for u8 {
    const BITS: usize = 8;

    #[inline(always)]
    fn index(self) -> usize {
        usize::from(self)
    }

    #[inline(always)]
    fn word<const K: usize>(row: &[u8; K]) -> u64 {
        let mut bytes = [0; 8];
        bytes[..K].copy_from_slice(row);
        u64::from_le_bytes(bytes)
    }
}

impl ExpertId for u16 {
    const BITS: usize = 16;

    #[inline(always)]
    fn index(self) -> usize {
        usize::from(self)
    }

    #[inline(always)]
    fn word<const K: usize>(row: &[u16; K]) -> u64 {
        (0..K).fold(0, |word, i| word | u64::from(row[i]) << (16 * i))
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
    /// Checks the sizes of a routing: at least one layer and one expert, `1 <= K <= E`, ids within 16 bits.
    pub fn new(layers: usize, experts: usize, top_k: usize) -> Result<Self> {
        if layers == 0 {
            return Err(Error::shape("expert_ids", "at least one layer", &layers));
        }
        if experts == 0 || experts > 1 << 16 {
            return Err(Error::shape("num_experts", "a value from 1 to 65536", &experts));
        }
        if top_k == 0 || top_k > experts {
            let rule = format!("a top-k from 1 to num_experts ({experts})");
            return Err(Error::shape("expert_ids", rule, &top_k));
        }
        Ok(Self { layers, experts, top_k })
    }

    /// Returns the number of ids per token.
    #[must_use]
    pub fn row(&self) -> usize {
        self.layers * self.top_k
    }
}

/// Returns a number for every token `[T]`: the sum of the entries of a table `[L, E]` for its experts, which are in range.
pub fn code<I: ExpertId>(ids: &[I], routing: Routing, table: &[u64]) -> Vec<u64> {
    let Routing { experts, top_k, .. } = routing;
    let of_token = |token: &[I]| {
        let layers = token.chunks_exact(top_k).zip(table.chunks_exact(experts));
        let sum = |sum: u64, (ids, table): (&[I], &[u64])| {
            ids.iter().fold(sum, |sum, id| sum.wrapping_add(table[id.index()]))
        };
        layers.fold(0, sum)
    };
    ids.par_chunks_exact(routing.row()).with_min_len(ROWS_PER_TASK).map(of_token).collect()
}

/// Rows per task: enough to hide the scheduling, few enough for the first-level cache, since rows are read twice.
const ROWS_PER_TASK: usize = 1 << 12;

/// Checks every id of a shard: in range, and no expert twice in one token and layer.
///
/// The error is that of the first faulty token and layer. `first_token` is the position of the shard in its trace, which the
/// error needs to name the token.
pub fn validate<I: ExpertId>(ids: &[I], routing: Routing, first_token: u64) -> Result<()> {
    let k = routing.top_k;
    let faulty = ids
        .par_chunks(ROWS_PER_TASK * k)
        .enumerate()
        .filter_map(|(task, rows)| first_fault(rows, routing).map(|row| task * ROWS_PER_TASK + row))
        .min();
    faulty.map_or(Ok(()), |row| Err(describe(&ids[row * k..][..k], row, routing, first_token)))
}

/// Returns the first row (token and layer) that breaks a rule.
fn first_fault<I: ExpertId>(rows: &[I], routing: Routing) -> Option<usize> {
    if is_clean(rows, routing) {
        return None;
    }
    rows.chunks_exact(routing.top_k).position(|row| {
        row.iter().enumerate().any(|(i, id)| id.index() >= routing.experts || row[..i].contains(id))
    })
}

/// Returns whether all rows are free of faults.
///
/// Loops are written out: a closure that a library function calls would be compiled without the vector instructions.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+bmi2",
    "x86_64+avx2+bmi2"
))]
fn is_clean<I: ExpertId>(rows: &[I], routing: Routing) -> bool {
    let mut largest = rows[0];
    for &id in rows {
        largest = if id > largest { id } else { largest };
    }
    let are_distinct = match routing.top_k {
        1 => true,
        2 => is_distinct::<I, 2>(rows),
        4 => is_distinct::<I, 4>(rows),
        6 => is_distinct::<I, 6>(rows),
        8 => is_distinct::<I, 8>(rows),
        k => rows.chunks_exact(k).all(|row| !row.iter().enumerate().any(|(i, id)| row[..i].contains(id))),
    };
    largest.index() < routing.experts && are_distinct
}

/// Evaluates to whether the ids of every row of K are distinct; a row must fit a word of this type.
///
/// Two ids are equal if the exclusive or of the row and the row rotated by some number of ids has a lane of zero. Such a lane
/// shows when one is subtracted from every lane (Mycroft's test).
macro_rules! is_distinct_in {
    ($word:ty, $id:ty, $k:expr, $rows:expr) => {{
        let all = <$word>::MAX >> (<$word>::BITS as usize - $k * <$id>::BITS);
        let lane = |value: $word| (0..$k).fold(0, |lanes, i| lanes | value << (i * <$id>::BITS));
        let (low, high) = (lane(1), lane(1 << (<$id>::BITS - 1)));
        // The range is exclusive: an inclusive one unrolls too late for the loop over rows to become vector instructions.
        let end = $k / 2 + 1;
        let mut zero = 0;
        for row in $rows.as_chunks::<$k>().0 {
            let word = <$id>::word(row) as $word;
            for by in 1..end {
                let rotated = (word << (by * <$id>::BITS) | word >> (($k - by) * <$id>::BITS)) & all;
                let same = word ^ rotated;
                zero |= same.wrapping_sub(low) & !same & high;
            }
        }
        zero == 0
    }};
}

/// Returns whether the ids of every row of K are distinct.
#[inline(always)]
fn is_distinct<I: ExpertId, const K: usize>(rows: &[I]) -> bool {
    if K * I::BITS > 64 {
        let mut has_equal = false;
        for row in rows.as_chunks::<K>().0 {
            for i in 1..K {
                for j in 0..i {
                    has_equal |= row[i] == row[j];
                }
            }
        }
        return !has_equal;
    }
    if K * I::BITS <= 32 { is_distinct_in!(u32, I, K, rows) } else { is_distinct_in!(u64, I, K, rows) }
}

/// Returns the error of a faulty row.
fn describe<I: ExpertId>(ids: &[I], row: usize, routing: Routing, first_token: u64) -> Error {
    let token = first_token + (row / routing.layers) as u64;
    let layer = row % routing.layers;
    let Routing { experts, .. } = routing;
    let fault = if let Some(id) = ids.iter().find(|id| id.index() >= experts) {
        format!("{} is not below num_experts {experts}", id.index())
    } else {
        let twice = (0..ids.len()).find(|&at| ids[..at].contains(&ids[at])).map_or(0, |at| ids[at].index());
        format!("{twice} appears twice; a token's experts must differ")
    };
    Error::Id(token, layer, fault)
}
