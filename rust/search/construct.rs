//! Where the search starts: balanced loads, whatever the traffic.

use crate::instance::Instance;

/// The expert in every slot `[L, P]`, packed by the longest-processing-time rule: the heaviest expert first, to the
/// least loaded device with a free slot.
#[must_use]
pub fn balanced(instance: &Instance) -> Vec<u16> {
    let sizes = instance.sizes;
    let (p, d, s) = (sizes.slots(), sizes.devices, sizes.per_device);
    let mut expert_in = vec![0; sizes.layers * p];
    for (l, expert_in) in expert_in.chunks_exact_mut(p).enumerate() {
        let load = &instance.load[l * p..][..p];
        let mut order: Vec<usize> = (0..p).collect();
        order.sort_by_key(|&e| (std::cmp::Reverse(load[e]), e));
        let mut members: Vec<Vec<usize>> = vec![Vec::with_capacity(s); d];
        let mut sums = vec![0u64; d];
        for e in order {
            let free = (0..d).filter(|&g| members[g].len() < s);
            let g = free.min_by_key(|&g| (sums[g], g)).expect("there are as many slots as entries");
            members[g].push(e);
            sums[g] += load[e];
        }
        lower_peak(load, &mut members, &mut sums);
        for (slot, &e) in members.iter().flatten().enumerate() {
            expert_in[slot] = e as u16;
        }
    }
    expert_in
}

/// Swaps experts of the fullest device for lighter ones elsewhere while that lowers the peak of the two.
fn lower_peak(load: &[u64], members: &mut [Vec<usize>], sums: &mut [u64]) {
    loop {
        let top = (0..sums.len()).max_by_key(|&g| (sums[g], std::cmp::Reverse(g))).expect("a device");
        let mut best = (sums[top], 0, 0, 0);
        for h in (0..sums.len()).filter(|&h| h != top) {
            for (i, &e) in members[top].iter().enumerate() {
                for (j, &f) in members[h].iter().enumerate() {
                    if load[e] > load[f] {
                        let by = load[e] - load[f];
                        best = best.min(((sums[top] - by).max(sums[h] + by), h, i, j));
                    }
                }
            }
        }
        let (peak, h, i, j) = best;
        if peak >= sums[top] {
            return;
        }
        let (e, f) = (members[top][i], members[h][j]);
        (members[top][i], members[h][j]) = (f, e);
        sums[top] = sums[top] - load[e] + load[f];
        sums[h] = sums[h] - load[f] + load[e];
    }
}
