//! Sets of experts that tokens chose: the distinct sets of a layer, and the number of tokens of each.
//!
//! The number of devices that a token visits depends on its whole set, not on pairs. Counts of sets add up like all others.

/// No set, in the table.
const FREE: u32 = u32::MAX;

/// Distinct sets of `top_k` experts with counts. Memory depends on their number, not on that of tokens.
#[derive(Debug, Clone)]
pub struct Sets {
    top_k: usize,
    /// Ids of every set, rising `[N, K]`, in the order in which the sets appeared.
    ids: Vec<u16>,
    counts: Vec<u64>,
    /// Hash table of sets with linear probing; its length is a power of two, and it is at most half full.
    table: Vec<u32>,
    /// The row at hand.
    row: Vec<u16>,
    /// The set that was counted last.
    last: usize,
}

impl Sets {
    /// Builds an empty table of sets of `top_k` experts each.
    #[must_use]
    pub fn new(top_k: usize) -> Self {
        Self { top_k, ids: Vec::new(), counts: Vec::new(), table: vec![FREE; 64], row: Vec::new(), last: 0 }
    }

    /// Counts a set, its experts in any order.
    pub fn add(&mut self, ids: impl IntoIterator<Item = u16>, count: u64) {
        self.row.clear();
        self.row.extend(ids);
        self.row.sort_unstable();
        let mut at = self.begin(&self.row);
        loop {
            match self.table[at] {
                FREE => break,
                set if self.of(set as usize) == self.row => {
                    self.counts[set as usize] += count;
                    self.last = set as usize;
                    return;
                }
                _ => at = (at + 1) & (self.table.len() - 1),
            }
        }
        self.last = self.counts.len();
        self.table[at] = self.last as u32;
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
        let mut order: Vec<usize> = (0..self.counts.len()).collect();
        order.sort_unstable_by_key(|&set| self.of(set));
        let ids = order.iter().flat_map(|&set| self.of(set)).copied().collect();
        (ids, order.iter().map(|&set| self.counts[set]).collect())
    }

    /// Returns the ids of a set `[K]`.
    fn of(&self, set: usize) -> &[u16] {
        &self.ids[set * self.top_k..][..self.top_k]
    }

    /// Returns where the search for a set begins in the table.
    fn begin(&self, ids: &[u16]) -> usize {
        let mix =
            |hash: u64, &id: &u16| (hash.rotate_left(5) ^ u64::from(id)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        // The upper bits of a product depend on all of its factors' bits.
        (ids.iter().fold(0, mix) >> 32) as usize & (self.table.len() - 1)
    }

    /// Enlarges the table.
    fn grow(&mut self) {
        self.table = vec![FREE; self.table.len() * 4];
        for set in 0..self.counts.len() {
            let mut at = self.begin(self.of(set));
            while self.table[at] != FREE {
                at = (at + 1) & (self.table.len() - 1);
            }
            self.table[at] = set as u32;
        }
    }
}
