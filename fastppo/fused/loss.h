// PPO's loss of one row and its gradient, beside their eager twins in core/ppo.py, core/losses.py and policy/distributions.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "network.h"

namespace fastppo {

constexpr float kIllegal = -1e8f;  // distributions.ILLEGAL
constexpr float kHalfLogTwoPi = 0.91893853320467274f;

// torch.minimum and torch.maximum: NaN passes through.
inline float minimum(float a, float b) { return a < b || std::isnan(a) ? a : b; }
inline float maximum(float a, float b) { return a > b || std::isnan(a) ? a : b; }
// What of a gradient goes to the smaller of two, or the larger: all, or half where they are equal, as in torch.
inline float share(float mine, float other) { return mine < other ? 1.0f : mine == other ? 0.5f : 0.0f; }

struct Outcome {
  float log_prob, entropy;
};

// distributions.mask_logits: the logits of illegal actions become kIllegal; a choice without a legal action keeps its logits.
// Then `kept` (0 or 1 for each logit) is what lets a gradient through.
inline void mask_logits(const std::vector<int64_t>& choices, const uint8_t* legal, float* logits, uint8_t* kept) {
  for (const int64_t number : choices) {
    const bool any = std::any_of(legal, legal + number, [](uint8_t value) { return value != 0; });
    for (int64_t a = 0; a < number; ++a) {
      kept[a] = !any || legal[a];
      if (!kept[a]) logits[a] = kIllegal;
    }
    legal += number;
    logits += number;
    kept += number;
  }
}

// distributions.categorical_log_prob and categorical_entropy, summed over choices. `logits` become log-probabilities; `entropies`
// gets each choice's.
inline Outcome categorical(const std::vector<int64_t>& choices, const int64_t* action, float* logits, float* entropies) {
  Outcome sum{0.0f, 0.0f};
  for (size_t k = 0; k < choices.size(); ++k) {
    const int64_t number = choices[k];
    const float largest = *std::max_element(logits, logits + number);
    float total = 0.0f, entropy = 0.0f;
    for (int64_t a = 0; a < number; ++a) total += std::exp(logits[a] - largest);
    const float log_sum = largest + std::log(total);
    const bool known = action[k] >= 0 && action[k] < number;  // the action of a row that was not acted on may be anything
    sum.log_prob += (known ? logits[action[k]] : 0.0f) - log_sum;
    for (int64_t a = 0; a < number; ++a) {
      logits[a] -= log_sum;
      entropy -= std::exp(logits[a]) * logits[a];
    }
    entropies[k] = entropy;
    sum.entropy += entropy;
    logits += number;
  }
  return sum;
}

// d/d logits of d_log_prob * log_prob + d_entropy * entropy:
//   d log_prob / d logit[a] = [a is the action] - p[a],   d entropy / d logit[a] = -p[a] (log p[a] + entropy)
inline void categorical_gradient(const std::vector<int64_t>& choices, const int64_t* action, const float* log_probs,
                                 const float* entropies, float d_log_prob, float d_entropy, float* d_logits) {
  for (size_t k = 0; k < choices.size(); ++k) {
    for (int64_t a = 0; a < choices[k]; ++a) {
      const float p = std::exp(log_probs[a]);
      d_logits[a] = d_log_prob * ((a == action[k] ? 1.0f : 0.0f) - p) - d_entropy * p * (log_probs[a] + entropies[k]);
    }
    log_probs += choices[k];
    d_logits += choices[k];
  }
}

// distributions.normal_log_prob and normal_entropy. `mean` becomes the standardised action z.
inline Outcome normal(int64_t size, const float* action, const float* log_std, float* mean) {
  Outcome sum{0.0f, 0.0f};
  for (int64_t a = 0; a < size; ++a) {
    mean[a] = (action[a] - mean[a]) * std::exp(-log_std[a]);
    sum.log_prob += -0.5f * mean[a] * mean[a] - log_std[a] - kHalfLogTwoPi;
    sum.entropy += log_std[a] + kHalfLogTwoPi + 0.5f;
  }
  return sum;
}

// d log_prob / d mean = z / std,   d log_prob / d log_std = z^2 - 1,   d entropy / d log_std = 1
inline void normal_gradient(int64_t size, const float* z, const float* log_std, float d_log_prob, float d_entropy, float* d_mean,
                            float* d_log_std) {
  for (int64_t a = 0; a < size; ++a) {
    d_mean[a] = d_log_prob * z[a] * std::exp(-log_std[a]);
    d_log_std[a] += d_log_prob * (z[a] * z[a] - 1.0f) + d_entropy;
  }
}

struct Target {  // what the loss takes of a row beside the outputs of the networks: ppo.Rows
  float old_log_prob, advantage, value_target, old_value, valid;
  float unused[3];  // two rows fill a cache line
};

struct Coefficients {
  float clip_coef, ent_coef, vf_coef;
  bool clip_vloss;
};

struct LossSums {  // over rows: MINIBATCH_METRICS of core/ppo.py
  double policy_loss = 0.0, value_loss = 0.0, entropy = 0.0, approx_kl = 0.0, clipfrac = 0.0;
  float deviation = 0.0f;  // max |ratio - 1|
};

struct RowGradient {
  float log_prob, entropy, value;
};

// core.ppo.ppo_loss of one row, added to `sums`; returns its gradient.
inline RowGradient ppo_loss(Outcome outcome, float value, const Target& row, float weight, const Coefficients& c, LossSums* sums) {
  const float log_ratio = weight > 0.0f ? outcome.log_prob - row.old_log_prob : 0.0f;
  const float ratio = std::exp(log_ratio);

  // losses.clipped_policy_loss
  const float low = 1.0f - c.clip_coef, high = 1.0f + c.clip_coef;
  const float raised = maximum(ratio, low), clipped = minimum(raised, high);
  const float plain_gain = ratio * row.advantage, clipped_gain = clipped * row.advantage;
  const float policy_loss = -minimum(plain_gain, clipped_gain);
  const float through_clip = share(-ratio, -low) * share(raised, high);
  const float d_ratio = -row.advantage * (share(plain_gain, clipped_gain) + share(clipped_gain, plain_gain) * through_clip);

  // losses.squared_value_loss or clipped_value_loss
  const float error = value - row.value_target;
  float value_loss = error * error, d_value = 2.0f * error;
  if (c.clip_vloss) {
    const float change = value - row.old_value, floored = maximum(change, -c.clip_coef);
    const float clipped_error = row.old_value + minimum(floored, c.clip_coef) - row.value_target;
    const float clipped_loss = clipped_error * clipped_error;
    const float d_change = share(-change, c.clip_coef) * share(floored, c.clip_coef);
    d_value = d_value * share(-value_loss, -clipped_loss) +
              2.0f * clipped_error * d_change * share(-clipped_loss, -value_loss);
    value_loss = maximum(value_loss, clipped_loss);
  }

  const float deviation = std::fabs(ratio - 1.0f);
  sums->policy_loss += weight * policy_loss;
  sums->value_loss += weight * value_loss;
  sums->entropy += weight * outcome.entropy;
  sums->approx_kl += weight * (std::expm1(log_ratio) - log_ratio);  // losses.approximate_kl
  sums->clipfrac += deviation > c.clip_coef ? weight : 0.0f;
  sums->deviation = maximum(sums->deviation, deviation);

  // loss = policy_loss + vf_coef value_loss - ent_coef entropy; d ratio / d log_prob = ratio
  const float d_log_prob = weight > 0.0f ? weight * d_ratio * ratio : 0.0f;
  return {d_log_prob, -c.ent_coef * weight, c.vf_coef * weight * d_value};
}

}  // namespace fastppo
