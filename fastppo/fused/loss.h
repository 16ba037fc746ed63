// PPO's loss of rows and its gradient, beside their eager twins in core/ppo.py, core/losses.py and policy/distributions.py.
//
// Each function takes the kWidth rows of a block from row r on, a row a lane.
#pragma once

#include "network.h"

namespace fastppo {

constexpr float kIllegal = -1e8f;  // distributions.ILLEGAL
constexpr float kHalfLogTwoPi = 0.91893853320467274f;

// What of a gradient goes to the smaller of two: all, or half where they are equal, as in torch.
inline Vector share(Vector mine, Vector other) {
  return mine < other ? broadcast(1.0f) : mine == other ? broadcast(0.5f) : Vector{};
}

struct Outcome {
  Vector log_prob, entropy;
};

// Which actions of row i of the block are legal, as 1 or 0.
inline void read_mask(const uint8_t* mask, int64_t size, int64_t i, const Columns& legal) {
  for (int64_t a = 0; a < size; ++a) legal.column(a)[i] = mask[a] ? 1.0f : 0.0f;
}

// distributions.mask_logits: the logits of illegal actions become kIllegal; a choice without a legal action keeps its logits.
// Then `legal` (0 or 1 for each logit) is what lets a gradient through.
inline void mask_logits(const std::vector<int64_t>& choices, const Columns& legal, int64_t r, const Columns& logits) {
  int64_t first = 0;
  for (const int64_t number : choices) {
    Vector any = {};
    for (int64_t a = first; a < first + number; ++a) any += load(legal.column(a) + r);
    for (int64_t a = first; a < first + number; ++a) {
      const Integers kept = (load(legal.column(a) + r) > 0.0f) | (any == 0.0f);
      store(legal.column(a) + r, where(kept, broadcast(1.0f)));
      store(logits.column(a) + r, kept ? load(logits.column(a) + r) : broadcast(kIllegal));
    }
    first += number;
  }
}

// distributions.categorical_log_prob and categorical_entropy, summed over choices. `logits` become log-probabilities; `entropies`
// gets each choice's. The action of a row that was not acted on may be none of them.
inline Outcome categorical(const std::vector<int64_t>& choices, const Columns& action, int64_t r, const Columns& logits,
                           const Columns& entropies) {
  Outcome sum{};
  int64_t first = 0;
  for (size_t k = 0; k < choices.size(); ++k) {
    const int64_t end = first + choices[k];
    Vector largest = load(logits.column(first) + r), total = {}, entropy = {};
    for (int64_t a = first + 1; a < end; ++a) largest = maximum(largest, load(logits.column(a) + r));
    for (int64_t a = first; a < end; ++a) total += exp(load(logits.column(a) + r) - largest);
    const Vector log_sum = largest + log(total), chosen = load(action.column(k) + r);
    for (int64_t a = first; a < end; ++a) {
      const Vector log_prob = load(logits.column(a) + r) - log_sum;
      store(logits.column(a) + r, log_prob);
      sum.log_prob += where(chosen == static_cast<float>(a - first), log_prob);
      entropy -= exp(log_prob) * log_prob;
    }
    store(entropies.column(k) + r, entropy);
    sum.entropy += entropy;
    first = end;
  }
  return sum;
}

// d/d logits of d_log_prob * log_prob + d_entropy * entropy:
//   d log_prob / d logit[a] = [a is the action] - p[a],   d entropy / d logit[a] = -p[a] (log p[a] + entropy)
inline void categorical_gradient(const std::vector<int64_t>& choices, const Columns& action, int64_t r, const Columns& log_probs,
                                 const Columns& entropies, Vector d_log_prob, Vector d_entropy, const Columns& d_logits) {
  int64_t first = 0;
  for (size_t k = 0; k < choices.size(); ++k) {
    const int64_t end = first + choices[k];
    const Vector chosen = load(action.column(k) + r), entropy = load(entropies.column(k) + r);
    for (int64_t a = first; a < end; ++a) {
      const Vector log_prob = load(log_probs.column(a) + r), p = exp(log_prob);
      const Vector is_action = where(chosen == static_cast<float>(a - first), broadcast(1.0f));
      store(d_logits.column(a) + r, d_log_prob * (is_action - p) - d_entropy * p * (log_prob + entropy));
    }
    first = end;
  }
}

// distributions.normal_log_prob and normal_entropy. Components come behind choices; `out` is logits, then means, and each mean
// becomes the standardised action z.
inline Outcome normal(const Network& network, const Columns& action, int64_t r, const float* log_std, const Columns& out) {
  Outcome sum{};
  for (int64_t a = 0; a < network.num_normal(); ++a) {
    float* mean = out.column(network.num_logits + a) + r;
    const Vector z = (load(action.column(network.num_choices() + a) + r) - load(mean)) * std::exp(-log_std[a]);
    store(mean, z);
    sum.log_prob += -0.5f * z * z - log_std[a] - kHalfLogTwoPi;
    sum.entropy += log_std[a] + kHalfLogTwoPi + 0.5f;
  }
  return sum;
}

// d log_prob / d mean = z / std,   d log_prob / d log_std = z^2 - 1,   d entropy / d log_std = 1. counted: which lanes are rows.
// Where d_log_prob is 0, z may be so large that z^2 is inf.
inline void normal_gradient(const Network& network, const Columns& z, int64_t r, const float* log_std, Integers counted,
                            Vector d_log_prob, Vector d_entropy, const Columns& d_out, float* d_log_std) {
  for (int64_t a = 0; a < network.num_normal(); ++a) {
    const Vector value = load(z.column(network.num_logits + a) + r);
    store(d_out.column(network.num_logits + a) + r, d_log_prob * value * std::exp(-log_std[a]));
    d_log_std[a] += static_cast<float>(sum(where(counted, d_log_prob * value * value - d_log_prob + d_entropy)));
  }
}

struct Target {  // what the loss takes of a row beside the outputs of the networks: ppo.Rows
  float old_log_prob, advantage, value_target, old_value, valid;
  float unused[3];  // two rows fill a cache line
};
enum TargetColumn { kOldLogProb, kAdvantage, kValueTarget, kOldValue, kValid, kTargetSize };  // the same of a block's rows

struct Coefficients {
  float clip_coef, ent_coef, vf_coef;
  bool clip_vloss;
};

struct LossSums {  // over rows: MINIBATCH_METRICS of core/ppo.py
  double policy_loss = 0.0, value_loss = 0.0, entropy = 0.0, approx_kl = 0.0, clipfrac = 0.0;
  float deviation = 0.0f;  // max |ratio - 1|
};

struct RowLosses {  // the same of each row, weighted
  Vector policy_loss, value_loss, entropy, approx_kl, clipfrac, deviation;
};

struct RowGradients {
  Vector log_prob, entropy, value;
};

// losses.squared_value_loss or clipped_value_loss, and its slope.
inline Vector value_loss(Vector value, Vector old_value, Vector target, const Coefficients& c, Vector* slope) {
  const Vector error = value - target, loss = error * error;
  *slope = 2.0f * error;
  if (!c.clip_vloss) return loss;
  const Vector clip = broadcast(c.clip_coef), change = value - old_value, floored = maximum(change, -clip);
  const Vector clipped_error = old_value + minimum(floored, clip) - target, clipped_loss = clipped_error * clipped_error;
  const Vector d_change = share(-change, clip) * share(floored, clip);
  *slope = *slope * share(-loss, -clipped_loss) + 2.0f * clipped_error * d_change * share(-clipped_loss, -loss);
  return maximum(loss, clipped_loss);
}

// core.ppo.ppo_loss. weight: of each row, 0 for one that does not count. target: by TargetColumn.
inline RowGradients ppo_loss(Outcome outcome, Vector value, const Columns& target, int64_t r, Vector weight, const Coefficients& c,
                             RowLosses* losses) {
  const auto of = [&](TargetColumn column) { return load(target.column(column) + r); };
  const Vector advantage = of(kAdvantage), log_ratio = where(weight > 0.0f, outcome.log_prob - of(kOldLogProb));
  Vector approx_kl;  // losses.approximate_kl
  const Vector ratio = exp(log_ratio, &approx_kl);

  // losses.clipped_policy_loss
  const Vector low = broadcast(1.0f - c.clip_coef), high = broadcast(1.0f + c.clip_coef);
  const Vector raised = maximum(ratio, low), clipped = minimum(raised, high);
  const Vector plain_gain = ratio * advantage, clipped_gain = clipped * advantage;
  const Vector through_clip = share(-ratio, -low) * share(raised, high);
  const Vector d_ratio = -advantage * (share(plain_gain, clipped_gain) + share(clipped_gain, plain_gain) * through_clip);

  Vector d_value;
  const Vector of_value = value_loss(value, of(kOldValue), of(kValueTarget), c, &d_value);
  const Vector deviation = ratio > 1.0f ? ratio - 1.0f : 1.0f - ratio;
  *losses = {-weight * minimum(plain_gain, clipped_gain), weight * of_value, weight * outcome.entropy, weight * approx_kl,
             where(deviation > c.clip_coef, weight), deviation};

  // loss = policy_loss + vf_coef value_loss - ent_coef entropy; d ratio / d log_prob = ratio
  return {where(weight > 0.0f, weight * d_ratio * ratio), -c.ent_coef * weight, c.vf_coef * weight * d_value};
}

}  // namespace fastppo
