//! The least of a list of numbers, updated in a few steps without branches when one of them changes.

/// A tournament tree: of two neighbours the lesser one is their parent.
#[derive(Debug)]
pub(crate) struct Tournament<K> {
    /// Nodes of the tree: the root at 1, the children of node `i` at `2 * i` and `2 * i + 1`.
    nodes: Vec<K>,
    /// Index of the first number among the nodes.
    first: usize,
}

impl<K: Ord + Copy> Tournament<K> {
    /// Builds the tree of some numbers; `none`, which is no less than any, fills it up.
    pub(crate) fn new(numbers: impl ExactSizeIterator<Item = K>, none: K) -> Self {
        let first = numbers.len().next_power_of_two();
        let mut nodes = vec![none; first];
        nodes.extend(numbers);
        nodes.resize(2 * first, none);
        for at in (1..first).rev() {
            nodes[at] = nodes[2 * at].min(nodes[2 * at + 1]);
        }
        Self { nodes, first }
    }

    /// Returns the least number.
    pub(crate) fn get(&self) -> K {
        self.nodes[1]
    }

    /// Replaces the number at an index.
    pub(crate) fn set(&mut self, index: usize, number: K) {
        let mut at = self.first + index;
        self.nodes[at] = number;
        while at > 1 {
            let least = self.nodes[at].min(self.nodes[at ^ 1]);
            at /= 2;
            self.nodes[at] = least;
        }
    }
}
