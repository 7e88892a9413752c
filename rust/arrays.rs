//! Small computations on counts and ids that several parts of the core share.

use std::ops::Add;

/// Returns the sums of the first 0, 1, 2, ... numbers, up to all of them: one sum more than numbers.
pub(crate) fn prefix_sums<T: Add<Output = T> + Copy + Default>(numbers: impl Iterator<Item = T>) -> Vec<T> {
    let mut sum = T::default();
    let mut sums = Vec::with_capacity(numbers.size_hint().0 + 1);
    sums.push(sum);
    for number in numbers {
        sum = sum + number;
        sums.push(sum);
    }
    sums
}

/// Returns the number of groups (nodes or failure domains) whose ids, counted from 0, are in `group_of`.
pub(crate) fn count_groups(group_of: &[u16]) -> usize {
    group_of.iter().max().map_or(0, |&last| usize::from(last) + 1)
}

/// Returns how many of the lowest bits of a number have to be cut so that `width` bits hold the rest.
pub(crate) fn bits_beyond(number: u128, width: u32) -> u32 {
    (u128::BITS - number.leading_zeros()).saturating_sub(width)
}
