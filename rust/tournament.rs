//! The least of some numbers, found again in a few steps that do not branch when one of them changes.

/// A tournament: every number plays its neighbour, and the lesser one goes on.
#[derive(Debug)]
pub(crate) struct Tournament<K> {
    /// The winner at 1, those who play for place `i` at `2 * i` and `2 * i + 1`.
    places: Vec<K>,
    /// Where the numbers themselves begin.
    first: usize,
}

impl<K: Ord + Copy> Tournament<K> {
    /// Takes numbers; `none` is no less than any, and where a number is missing.
    pub(crate) fn new(numbers: impl ExactSizeIterator<Item = K>, none: K) -> Self {
        let first = numbers.len().next_power_of_two();
        let mut places = vec![none; first];
        places.extend(numbers);
        places.resize(2 * first, none);
        for at in (1..first).rev() {
            places[at] = places[2 * at].min(places[2 * at + 1]);
        }
        Self { places, first }
    }

    /// The least number.
    pub(crate) fn get(&self) -> K {
        self.places[1]
    }

    /// Changes the number at an index.
    pub(crate) fn set(&mut self, index: usize, number: K) {
        let mut at = self.first + index;
        self.places[at] = number;
        while at > 1 {
            let least = self.places[at].min(self.places[at ^ 1]);
            at /= 2;
            self.places[at] = least;
        }
    }
}
