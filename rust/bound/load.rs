//! A lower bound on the largest device load of one layer, from the loads of its experts alone.

/// No assignment of the experts of a layer to `devices`, at most `slots` each, has a smaller largest device load.
///
/// `load` in tokens, `[experts]`; `slots * devices` must be at least the number of experts. Four facts: the largest
/// is not below the mean; the device of the heaviest expert is filled, at best, with the lightest others, as far as the
/// other devices cannot take them; of any `k D + 1` heaviest experts, k + 1 share a device; and so on for each k.
#[must_use]
pub fn largest_device_load(load: &[u64], devices: usize, slots: usize) -> u64 {
    if devices == 0 || load.is_empty() {
        return 0;
    }
    let mut sorted = load.to_vec();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    let sum = |loads: &[u64]| -> u128 { loads.iter().map(|&x| u128::from(x)).sum() };
    let experts = sorted.len();
    let mean = sum(&sorted).div_ceil(devices as u128);
    // Every device holds at least this many experts, since the others hold no more than their slots.
    let least = experts.saturating_sub(slots * (devices - 1));
    let mut bound = mean;
    for together in 1..=slots.min(experts.div_ceil(devices)) {
        // The lightest of the (together - 1) D + 1 heaviest, taken `together` times over: the lightest such group.
        let heavy = (together - 1) * devices + 1;
        let group = sum(&sorted[heavy - together..heavy]);
        let fill = least.saturating_sub(together).min(experts - heavy);
        bound = bound.max(group + sum(&sorted[experts - fill..]));
    }
    let fill = least.saturating_sub(1);
    bound = bound.max(u128::from(sorted[0]) + sum(&sorted[experts - fill..]));
    u64::try_from(bound).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::largest_device_load;
    use proptest::prelude::*;

    fn least(load: &[u64], devices: &mut Vec<(u64, usize)>, slots: usize) -> u64 {
        let Some((&first, rest)) = load.split_first() else {
            return devices.iter().map(|d| d.0).max().unwrap_or(0);
        };
        let mut best = u64::MAX;
        for d in 0..devices.len() {
            if devices[d].1 < slots {
                devices[d] = (devices[d].0 + first, devices[d].1 + 1);
                best = best.min(least(rest, devices, slots));
                devices[d] = (devices[d].0 - first, devices[d].1 - 1);
            }
        }
        best
    }

    proptest! {
        /// Trying every assignment finds none below the bound.
        #[test]
        fn never_above_the_least(
            load in prop::collection::vec((0u64..12).prop_map(|x| x * x), 1..8),
            devices in 1usize..4,
            spare in 0usize..2,
        ) {
            let slots = load.len().div_ceil(devices) + spare;
            let least = least(&load, &mut vec![(0, 0); devices], slots);
            let bound = largest_device_load(&load, devices, slots);
            prop_assert!(bound <= least, "{bound} is above {least}");
        }
    }

    /// One heavy expert, two that cannot be apart, and the mean each decide once.
    #[test]
    fn examples() {
        assert_eq!(largest_device_load(&[100, 1, 1, 1], 2, 2), 101);
        assert_eq!(largest_device_load(&[10, 10, 10, 0, 0, 0], 2, 3), 20);
        assert_eq!(largest_device_load(&[3, 3, 3, 3], 2, 2), 6);
        assert_eq!(largest_device_load(&[], 2, 2), 0);
    }
}
