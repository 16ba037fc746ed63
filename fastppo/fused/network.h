// A multi-layer perceptron for actor and critic (policy/mlp.py): its parameters, a forward and a backward pass of few rows.
//
// Parameters, their gradients and Adam's moments are kept *packed* here: each matrix in panels (product.h), each bias padded. What
// fills them up is zero and stays zero.
#pragma once

#include <memory>
#include <new>
#include <vector>

#include "product.h"

namespace fastppo {

constexpr int64_t kBlockRows = 48;  // rows that go through all layers at once: what they leave behind stays in the cache

struct NetworkShape {  // as in operators.py
  int64_t obs_size, action_size, num_hidden;
  const int64_t* hidden_sizes;
  int64_t activation, share_backbone, num_choices;
  const int64_t* choices;  // logits of each choice; num_choices is 0 for a diagonal Gaussian
};

// Memory for floats, aligned to cache lines and zero.
class Floats {
 public:
  explicit Floats(int64_t size = 0) : data_(static_cast<float*>(::operator new(bytes(size), kAlignment))) {
    std::memset(data_.get(), 0, bytes(size));
  }
  float* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static size_t bytes(int64_t size) { return static_cast<size_t>(size + 16) * sizeof(float); }
  struct Free {
    void operator()(float* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<float, Free> data_;
};

struct Matrix {
  int64_t inner, columns;
  int64_t panels, bias;  // places among the packed parameters
  int64_t turned;        // place of the transposed panels
  int64_t flat;          // place in the flat buffer: the matrix, then its bias
  bool is_head;          // the flat buffer has heads transposed
};

class Network {
 public:
  explicit Network(const NetworkShape& shape)
      : obs_size(shape.obs_size),
        action_size(shape.action_size),
        activation(static_cast<Activation>(shape.activation)),
        choices(shape.choices, shape.choices + shape.num_choices) {
    const int num_trunks = shape.share_backbone ? 1 : 2;
    for (int trunk = 0; trunk < num_trunks; ++trunk) {
      std::vector<Matrix> layers;
      int64_t inner = obs_size;
      for (int64_t layer = 0; layer < shape.num_hidden; ++layer) {
        layers.push_back(add(inner, shape.hidden_sizes[layer], false));
        inner = shape.hidden_sizes[layer];
      }
      trunks.push_back(layers);
      num_features = inner;
    }
    actor_head = add(num_features, action_size, true);
    critic_head = add(num_features, 1, true);
    log_std = size;
    log_std_flat = flat_size;
    if (is_gaussian()) {
      size += padded(action_size);
      flat_size += action_size;
    }
  }

  bool is_gaussian() const { return choices.empty(); }

  // Call visit(flat index, step between them, packed index, number) for all stretches of parameters that follow one another packed.
  template <class Visit>
  void for_stretches(Visit visit) const {
    for (const auto& layers : trunks) {
      for (const Matrix& matrix : layers) visit_matrix(matrix, visit);
    }
    visit_matrix(actor_head, visit);
    visit_matrix(critic_head, visit);
    if (is_gaussian()) visit(log_std_flat, 1, log_std, action_size);
  }

  void pack(const float* flat, float* packed) const {
    for_stretches([=](int64_t from, int64_t step, int64_t to, int64_t number) {
      for (int64_t i = 0; i < number; ++i) packed[to + i] = flat[from + i * step];
    });
  }

  void unpack(const float* packed, float* flat) const {
    for_stretches([=](int64_t to, int64_t step, int64_t from, int64_t number) {
      for (int64_t i = 0; i < number; ++i) flat[to + i * step] = packed[from + i];
    });
  }

  // The transposed matrices that the backward pass multiplies by: all but those that read the observation.
  void transpose_all(const float* packed, float* turned) const {
    for (const auto& layers : trunks) {
      for (size_t layer = 1; layer < layers.size(); ++layer) transpose_one(layers[layer], packed, turned);
    }
    if (trunks[0].empty()) return;
    transpose_one(actor_head, packed, turned);
    transpose_one(critic_head, packed, turned);
  }

  int64_t obs_size, action_size, num_features = 0;
  Activation activation;
  std::vector<int64_t> choices;
  std::vector<std::vector<Matrix>> trunks;  // of actor and critic, or one that both share
  Matrix actor_head, critic_head;
  int64_t log_std, log_std_flat;
  int64_t size = 0, flat_size = 0, turned_size = 0;

 private:
  Matrix add(int64_t inner, int64_t columns, bool is_head) {
    Matrix matrix{inner, columns, size, size + padded(columns) * inner, turned_size, flat_size, is_head};
    size += padded(columns) * (inner + 1);
    flat_size += columns * (inner + 1);
    turned_size += padded(inner) * columns;
    return matrix;
  }

  template <class Visit>
  static void visit_matrix(const Matrix& matrix, Visit visit) {
    const int64_t row_step = matrix.is_head ? 1 : matrix.columns, column_step = matrix.is_head ? matrix.inner : 1;
    for (int64_t k = 0; k < matrix.inner; ++k) {
      for (int64_t c = 0; c < matrix.columns; c += 2 * kWidth) {
        visit(matrix.flat + k * row_step + c * column_step, column_step,
              matrix.panels + in_panels(matrix.inner, matrix.columns, k, c), std::min<int64_t>(2 * kWidth, matrix.columns - c));
      }
    }
    visit(matrix.flat + matrix.inner * matrix.columns, 1, matrix.bias, matrix.columns);
  }

  static void transpose_one(const Matrix& matrix, const float* packed, float* turned) {
    transpose(packed + matrix.panels, matrix.inner, matrix.columns, turned + matrix.turned);
  }
};

// A few rows on their way through the network. Rows of a matrix are padded to whole registers.
struct Rows {
  Floats data;
  int64_t step;
  Rows(int64_t columns) : data(padded(columns) * kBlockRows), step(padded(columns)) {}
  float* row(int64_t r) const { return data.get() + r * step; }
};

struct Block {
  explicit Block(const Network& network)
      : obs(network.obs_size), actor(network.action_size), critic(1), d_actor(network.action_size), d_critic(1) {
    int64_t widest = 1;
    for (const auto& layers : network.trunks) {
      hidden.emplace_back();
      slope.emplace_back();
      for (const Matrix& matrix : layers) {
        hidden.back().emplace_back(matrix.columns);
        slope.back().emplace_back(matrix.columns);
        widest = std::max(widest, matrix.columns);
      }
    }
    delta.emplace_back(widest);
    delta.emplace_back(widest);
  }

  const Rows& features(int64_t trunk) const { return hidden[trunk].empty() ? obs : hidden[trunk].back(); }

  Rows obs, actor, critic;                       // input; logits or means; values, in column 0
  Rows d_actor, d_critic;                        // the gradient of the loss with respect to them
  std::vector<std::vector<Rows>> hidden, slope;  // by trunk and layer: outputs, and the activation's slope
  std::vector<Rows> delta;                       // the gradient with respect to a layer's sums, of two layers in turn
};

// Below, what inner loops use is captured by value: a store through Vector may alias everything that lies in memory.

inline void apply(const Rows& x, int64_t n, const Matrix& matrix, const float* packed, const Rows& out) {
  multiply(
      x.row(0), x.step, n, packed + matrix.panels, matrix.inner, matrix.columns,
      [bias = packed + matrix.bias](int64_t c) { return load(bias + c); },
      [to = out.row(0), step = out.step](int64_t r, int64_t c, Vector sum) { store(to + r * step + c, sum); });
}

// The activation of n rows of sums, in place, and its slope there. By itself: within `multiply` its many instructions keep the sums
// from staying in registers, and a layer takes 2.5 times as long.
template <Activation kind>
void activate(int64_t n, const Rows& x, const Rows& slope) {
  float *to = x.row(0), *slopes = slope.row(0);
  for (int64_t i = 0; i < n * x.step; i += kWidth) {
    Vector s;
    store(to + i, activate<kind>(load(to + i), &s));
    store(slopes + i, s);
  }
}

template <Activation kind>
void forward_trunk(const std::vector<Matrix>& layers, const float* packed, int64_t n, const Block& block, int64_t trunk) {
  const Rows* x = &block.obs;
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const Rows& hidden = block.hidden[trunk][layer];
    apply(*x, n, layers[layer], packed, hidden);
    activate<kind>(n, hidden, block.slope[trunk][layer]);
    x = &hidden;
  }
}

inline void forward_trunk(const Network& network, const float* packed, int64_t n, const Block& block, int64_t trunk) {
  const auto& layers = network.trunks[trunk];
  switch (network.activation) {
    case Activation::kTanh: return forward_trunk<Activation::kTanh>(layers, packed, n, block, trunk);
    case Activation::kRelu: return forward_trunk<Activation::kRelu>(layers, packed, n, block, trunk);
    case Activation::kElu: return forward_trunk<Activation::kElu>(layers, packed, n, block, trunk);
    case Activation::kSilu: return forward_trunk<Activation::kSilu>(layers, packed, n, block, trunk);
    case Activation::kGelu: return forward_trunk<Activation::kGelu>(layers, packed, n, block, trunk);
  }
}

// block.actor and block.critic of the n rows in block.obs.
inline void forward(const Network& network, const float* packed, int64_t n, const Block& block) {
  const auto last = static_cast<int64_t>(network.trunks.size()) - 1;
  for (int64_t trunk = 0; trunk <= last; ++trunk) forward_trunk(network, packed, n, block, trunk);
  apply(block.features(0), n, network.actor_head, packed, block.actor);
  apply(block.features(last), n, network.critic_head, packed, block.critic);
}

// gradient (packed) += that of n rows of one trunk, from block.d_actor and block.d_critic of the heads on it, after `forward`.
inline void backward_trunk(const Network& network, const float* turned, int64_t n, const Block& block, size_t trunk, float* gradient) {
  const auto add = [&](const Matrix& matrix, const Rows& x, const Rows& delta) {
    add_outer_products(x.row(0), x.step, delta.row(0), delta.step, n, matrix.inner, matrix.columns, gradient + matrix.panels);
    add_rows(delta.row(0), delta.step, n, matrix.columns, gradient + matrix.bias);
  };
  const auto back = [&](const Matrix& matrix, const Rows& delta, auto put) {  // put(row, column, delta times transposed matrix)
    multiply(
        delta.row(0), delta.step, n, turned + matrix.turned, matrix.columns, matrix.inner, [](int64_t) { return Vector{}; }, put);
  };
  const auto into = [](const Rows& out, const Rows& slope) {  // the sums times a layer's slope
    return [to = out.row(0), slopes = slope.row(0), step = out.step, slope_step = slope.step](int64_t r, int64_t c, Vector sum) {
      store(to + r * step + c, sum * load(slopes + r * slope_step + c));
    };
  };
  const auto& layers = network.trunks[trunk];
  const bool shared = network.trunks.size() == 1, is_actor = trunk == 0;
  const Matrix& head = is_actor ? network.actor_head : network.critic_head;
  const Rows& d_head = is_actor ? block.d_actor : block.d_critic;
  add(head, block.features(trunk), d_head);
  if (shared) add(network.critic_head, block.features(trunk), block.d_critic);
  if (layers.empty()) return;
  const Rows *delta = &block.delta[0], *next = &block.delta[1];
  if (shared) {
    const Rows& slope = block.slope[trunk].back();
    back(head, d_head, [to = delta->row(0), step = delta->step](int64_t r, int64_t c, Vector sum) { store(to + r * step + c, sum); });
    back(network.critic_head, block.d_critic,
         [to = delta->row(0), step = delta->step, put = into(*delta, slope)](int64_t r, int64_t c, Vector sum) {
           put(r, c, sum + load(to + r * step + c));
         });
  } else {
    back(head, d_head, into(*delta, block.slope[trunk].back()));
  }
  for (size_t layer = layers.size() - 1; layer > 0; --layer) {
    add(layers[layer], block.hidden[trunk][layer - 1], *delta);
    back(layers[layer], *delta, into(*next, block.slope[trunk][layer - 1]));
    std::swap(delta, next);
  }
  add(layers[0], block.obs, *delta);
}

}  // namespace fastppo
