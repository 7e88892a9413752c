//! What experts do on their own, which no window seen tells of the next one.
//!
//! Most of what a window brings is a mixture of what other windows brought: a placement that levels those levels it as
//! well, whatever the mixture. The rest, each expert's own, adds up on a device like noise: its variances add, times the
//! squares of the copies' shares. So in every window a device is taken to have its load and a multiple of the standard
//! deviation of that rest. The mean plus z standard deviations is what `vllm-ascend`'s `FlashLB` scores devices by, all
//! windows taken together and all of their variance taken for noise.

/// The variance of an expert's own share of a window, times the square of how many standard deviations count: three
/// parts, in order of the fields.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Noise {
    /// Of the square of the mean expert's share: an expert that no window used may be busy in the next.
    pub even: f64,
    /// Of the square of its share in the window: the busier, the less certain.
    pub share: f64,
    /// Of the variance of its share among windows: who changed will change.
    pub variance: f64,
}

/// Own variances of experts in windows `[W, E]`, in squares of a window's load, of weighted loads `[W, E]` and every
/// window's part of all tokens `[W]`.
pub(in crate::layer) fn variances(load: &[f64], part: &[f64], experts: usize, noise: Noise) -> Vec<f64> {
    let totals: Vec<f64> = load.chunks_exact(experts).map(|row| row.iter().sum()).collect();
    let share = |w: usize, e: usize| if totals[w] > 0.0 { load[w * experts + e] / totals[w] } else { 0.0 };
    let repeated: f64 = part.iter().map(|part| part * part).sum();
    let unbiased = if repeated < 1.0 { 1.0 / (1.0 - repeated) } else { 0.0 };
    let among: Vec<f64> = (0..experts)
        .map(|e| {
            let mean: f64 = part.iter().enumerate().map(|(w, part)| part * share(w, e)).sum();
            let square: f64 =
                part.iter().enumerate().map(|(w, part)| part * (share(w, e) - mean).powi(2)).sum();
            unbiased * square
        })
        .collect();
    let even = noise.even / (experts * experts) as f64;
    let variance = |at: usize| {
        let (w, e) = (at / experts, at % experts);
        if totals[w] > 0.0 {
            even + noise.share * share(w, e).powi(2) + noise.variance * among[e]
        } else {
            0.0
        }
    };
    (0..load.len()).map(variance).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::terms::balance::Balance;
    use crate::layer::terms::windows::Windows;
    use crate::layer::{EMPTY, Layer, Placement};
    use proptest::prelude::*;

    proptest! {
        /// The cost is that of the definition, in double precision, wherever experts and copies are.
        #[test]
        fn cost_is_as_defined(
            load in prop::collection::vec(prop::collection::vec(0u32..1000, 6), 2..20),
            norm in prop::sample::select(vec![2u32, 4, 8, 16]),
            copied in 0u16..6,
            noise in prop::array::uniform3(0.0f64..1.0),
            mixed in prop::sample::select(vec![0.0, 0.5, 2.0]),
        ) {
            let rows: Vec<f64> = load.iter().flatten().map(|&tokens| f64::from(tokens) + 1.0).collect();
            let [even, share, variance] = noise;
            let noise = Noise { even, share, variance };
            let weight = vec![1.0; load.len()];
            let layer = Layer::plain(vec![3; 3], 6, Windows::new(&rows, &weight, 6, norm, Some(noise), mixed));
            let mut slots = vec![0, 1, EMPTY, 2, 3, EMPTY, 4, 5, EMPTY];
            slots[if copied < 2 { 5 } else { 2 }] = copied;
            let placement = Placement::new(&layer, slots);
            let cost = Balance::new(&layer, &placement).cost() / layer.windows.scale;

            let total: f64 = rows.iter().sum();
            let of = |w: usize| &rows[w * 6..][..6];
            let tokens: Vec<f64> = (0..load.len()).map(|w| of(w).iter().sum()).collect();
            let mean = |e: usize| (0..load.len()).map(|w| of(w)[e]).sum::<f64>() / total;
            let unbiased = 1.0 - tokens.iter().map(|t| (t / total).powi(2)).sum::<f64>();
            let among = |e: usize| {
                (0..load.len()).map(|w| tokens[w] / total * (of(w)[e] / tokens[w] - mean(e)).powi(2)).sum::<f64>() / unbiased
            };
            // Shares of experts in a window, their own variances, and how many tokens it counts.
            let part = |w: usize| tokens[w] / total;
            let own = |w: usize, e: usize| {
                even / 36.0 + share * (of(w)[e] / tokens[w]).powi(2) + variance * among(e)
            };
            let mut all: Vec<(Vec<f64>, Vec<f64>, f64)> = (0..load.len())
                .map(|w| {
                    let shares = of(w).iter().map(|x| x / tokens[w]).collect();
                    (shares, (0..6).map(|e| own(w, e)).collect(), tokens[w])
                })
                .collect();
            let of_mean = |e: usize| (0..load.len()).map(|w| part(w).powi(2) * own(w, e)).sum::<f64>();
            all.push(((0..6).map(mean).collect(), (0..6).map(of_mean).collect(), mixed * total));
            let mut expected = 0.0;
            for (shares, own, counted) in all {
                let mut powers = 0.0;
                for device in 0..3u16 {
                    let held = (0..6u16).filter(|&e| placement.devices(e).contains(&device));
                    let (mut load, mut variance) = (0.0, 0.0);
                    for e in held {
                        let (part, e) = (1.0 / placement.devices(e).len() as f64, usize::from(e));
                        load += part * shares[e];
                        variance += part * part * own[e];
                    }
                    powers += (3.0 * (load + variance.sqrt())).powi(norm as i32);
                }
                expected += counted / 3.0 * powers.powf(1.0 / f64::from(norm)) / (1.0 + mixed);
            }
            prop_assert!((cost - expected).abs() <= 1e-3 * expected, "{cost} {expected}");
        }
    }
}
