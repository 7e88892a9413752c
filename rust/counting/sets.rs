//! Sets of experts that tokens chose: the distinct sets of a layer, and the number of tokens of each.
//!
//! The number of devices that a token visits depends on its whole set, not on pairs. Counts of sets add up like all others.

/// No set, in the table.
const FREE: u32 = u32::MAX;
/// Ids that begin a key by which sets are sorted.
const KEY_IDS: usize = 8;

/// Distinct sets of `top_k` experts with counts. Memory depends on their number, not on that of tokens.
#[derive(Debug, Clone)]
pub struct Sets {
    top_k: usize,
    /// Ids of every set, rising `[N, K]`, in the order in which the sets appeared.
    ids: Vec<u16>,
    counts: Vec<u64>,
    /// Hash table of sets with linear probing, each with its hash; its length is a power of two, and it is at most half
    /// full.
    table: Vec<(u32, u32)>,
    /// The row at hand.
    row: Vec<u16>,
    /// The set that was counted last.
    last: usize,
}

impl Sets {
    /// Builds an empty table of sets of `top_k` experts each.
    #[must_use]
    pub fn new(top_k: usize) -> Self {
        Self {
            top_k,
            ids: Vec::new(),
            counts: Vec::new(),
            table: vec![(FREE, 0); 64],
            row: Vec::new(),
            last: 0,
        }
    }

    /// Counts a set, its experts in any order.
    pub fn add(&mut self, ids: impl IntoIterator<Item = u16>, count: u64) {
        self.row.clear();
        self.row.extend(ids);
        self.row.sort_unstable();
        let hash = hash(&self.row);
        let mut at = hash as usize & (self.table.len() - 1);
        loop {
            match self.table[at] {
                (FREE, _) => break,
                (set, its) if its == hash && self.of(set as usize) == self.row => {
                    self.counts[set as usize] += count;
                    self.last = set as usize;
                    return;
                }
                _ => at = (at + 1) & (self.table.len() - 1),
            }
        }
        self.last = self.counts.len();
        self.table[at] = (self.last as u32, hash);
        self.ids.extend_from_slice(&self.row);
        self.counts.push(count);
        if self.counts.len() * 2 > self.table.len() {
            self.grow();
        }
    }

    /// Takes so many back of the set that was counted last, if there is one.
    pub fn take_back(&mut self, count: u64) {
        if let Some(last) = self.counts.get_mut(self.last) {
            *last -= count;
        }
    }

    /// Returns ids `[N, K]` and counts `[N]`, in the order of the ids, which does not depend on the order of tokens.
    #[must_use]
    pub fn finish(self) -> (Vec<u16>, Vec<u64>) {
        let rest = |set: usize| &self.of(set)[KEY_IDS.min(self.top_k)..];
        let mut order: Vec<(u128, usize)> =
            (0..self.counts.len()).map(|set| (key(self.of(set)), set)).collect();
        order.sort_unstable_by(|a, b| a.0.cmp(&b.0).then_with(|| rest(a.1).cmp(rest(b.1))));
        let ids = order.iter().flat_map(|&(_, set)| self.of(set)).copied().collect();
        (ids, order.iter().map(|&(_, set)| self.counts[set]).collect())
    }

    /// Returns the ids of a set `[K]`.
    fn of(&self, set: usize) -> &[u16] {
        &self.ids[set * self.top_k..][..self.top_k]
    }

    /// Enlarges the table.
    fn grow(&mut self) {
        let longer = vec![(FREE, 0); self.table.len() * 4];
        for entry in std::mem::replace(&mut self.table, longer) {
            if entry.0 == FREE {
                continue;
            }
            let mut at = entry.1 as usize & (self.table.len() - 1);
            while self.table[at].0 != FREE {
                at = (at + 1) & (self.table.len() - 1);
            }
            self.table[at] = entry;
        }
    }
}

/// Returns the hash of a set's ids.
fn hash(ids: &[u16]) -> u32 {
    let mix =
        |hash: u64, &id: &u16| (hash.rotate_left(5) ^ u64::from(id)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    // The upper bits of a product depend on all of its factors' bits.
    (ids.iter().fold(0, mix) >> 32) as u32
}

/// Returns the first ids of a set as a number that rises as they do: to compare numbers takes less time than slices.
fn key(ids: &[u16]) -> u128 {
    ids.iter().take(KEY_IDS).fold(0, |key, &id| key << 16 | u128::from(id))
}
