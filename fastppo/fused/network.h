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
static_assert(kBlockRows % kWidth == 0);  // a block's last rows are read by whole registers

struct NetworkShape {  // as in operators.py
  int64_t obs_size, action_size, num_hidden;
  const int64_t* hidden_sizes;
  int64_t activation, share_backbone, layer_norm, num_choices;
  const int64_t* choices;  // logits of each choice; the other outputs are the means of normal components
};

// Memory for floats, aligned to cache lines and zero.
class Floats {
 public:
  explicit Floats(int64_t size) : data_(static_cast<float*>(::operator new(bytes(size), kAlignment))) {
    std::memset(data_.get(), 0, bytes(size));
  }
  float* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static size_t bytes(int64_t size) { return static_cast<size_t>(size) * sizeof(float); }
  struct Free {
    void operator()(float* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<float, Free> data_;
};

// Of a layer: (inputs, outputs). A head is kept transposed, (outputs, inputs), as in the flat buffer: it may have few outputs.
struct Matrix {
  int64_t inner, columns;
  int64_t panels, bias, bias_size;  // places among the packed parameters
  int64_t turned;                   // place of the transposed panels
  int64_t flat;                     // place in the flat buffer: the matrix, its bias, then scale and shift
  int64_t scale, shift;             // places of layer normalisation's among the packed parameters; 0: the layer has none
};

class Network {
 public:
  explicit Network(const NetworkShape& shape)
      : obs_size(shape.obs_size),
        action_size(shape.action_size),
        activation(static_cast<Activation>(shape.activation)),
        layer_norm(shape.layer_norm != 0),
        choices(shape.choices, shape.choices + shape.num_choices) {
    const int num_trunks = shape.share_backbone ? 1 : 2;
    for (int trunk = 0; trunk < num_trunks; ++trunk) {
      std::vector<Matrix> layers;
      int64_t inner = obs_size;
      for (int64_t layer = 0; layer < shape.num_hidden; ++layer) {
        layers.push_back(add(inner, shape.hidden_sizes[layer], shape.hidden_sizes[layer]));
        if (layer_norm) add_norm(&layers.back());
        inner = shape.hidden_sizes[layer];
      }
      trunks.push_back(layers);
      num_features = inner;
    }
    actor_head = add(action_size, num_features, action_size);
    critic_head = add(1, num_features, 1);
    log_std = size;
    log_std_flat = flat_size;
    for (const int64_t number : choices) num_logits += number;
    size += padded(num_normal());
    flat_size += num_normal();
  }

  int64_t num_choices() const { return static_cast<int64_t>(choices.size()); }
  int64_t num_normal() const { return action_size - num_logits; }
  int64_t num_action_columns() const { return num_choices() + num_normal(); }  // a row of actions: int64 for choices alone

  // Call visit(flat index, packed index, number) for all stretches of parameters that follow one another packed.
  template <class Visit>
  void for_stretches(Visit visit) const {
    for (const auto& layers : trunks) {
      for (const Matrix& matrix : layers) visit_matrix(matrix, visit);
    }
    visit_matrix(actor_head, visit);
    visit_matrix(critic_head, visit);
    if (num_normal() > 0) visit(log_std_flat, log_std, num_normal());
  }

  void pack(const float* flat, float* packed) const {
    for_stretches([=](int64_t from, int64_t to, int64_t number) { std::copy_n(flat + from, number, packed + to); });
  }

  void unpack(const float* packed, float* flat) const {
    for_stretches([=](int64_t to, int64_t from, int64_t number) { std::copy_n(packed + from, number, flat + to); });
  }

  // A head of few outputs is multiplied as it is kept, others transposed.
  static bool is_narrow(const Matrix& head) { return 2 * head.inner <= kWidth; }

  // The transposed matrices that the forward pass multiplies by.
  void transpose_heads(const float* packed, float* turned) const {
    if (!is_narrow(actor_head)) transpose_one(actor_head, packed, turned);
  }

  // Those of the backward pass: all but those that read the observation.
  void transpose_layers(const float* packed, float* turned) const {
    for (const auto& layers : trunks) {
      for (size_t layer = 1; layer < layers.size(); ++layer) transpose_one(layers[layer], packed, turned);
    }
  }

  int64_t obs_size, action_size, num_logits = 0, num_features = 0;
  Activation activation;
  bool layer_norm;
  std::vector<int64_t> choices;
  std::vector<std::vector<Matrix>> trunks;  // of actor and critic, or one that both share
  Matrix actor_head, critic_head;
  int64_t log_std, log_std_flat;
  int64_t size = 0, flat_size = 0, turned_size = 0;

 private:
  Matrix add(int64_t inner, int64_t columns, int64_t bias_size) {
    Matrix matrix{inner, columns, size, size + padded(columns) * inner, bias_size, turned_size, flat_size, 0, 0};
    size += padded(columns) * inner + padded(bias_size);
    flat_size += columns * inner + bias_size;
    turned_size += padded(inner) * columns;
    return matrix;
  }

  void add_norm(Matrix* matrix) {
    matrix->scale = size;
    matrix->shift = size + padded(matrix->columns);
    size += 2 * padded(matrix->columns);
    flat_size += 2 * matrix->columns;
  }

  template <class Visit>
  static void visit_matrix(const Matrix& matrix, Visit visit) {
    for (int64_t k = 0; k < matrix.inner; ++k) {
      for (int64_t c = 0; c < matrix.columns; c += 2 * kWidth) {
        visit(matrix.flat + k * matrix.columns + c, matrix.panels + in_panels(matrix.inner, matrix.columns, k, c),
              std::min<int64_t>(2 * kWidth, matrix.columns - c));
      }
    }
    const int64_t bias = matrix.flat + matrix.inner * matrix.columns, scale = bias + matrix.bias_size;
    visit(bias, matrix.bias, matrix.bias_size);
    if (!matrix.scale) return;
    visit(scale, matrix.scale, matrix.columns);
    visit(scale + matrix.columns, matrix.shift, matrix.columns);
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

// Numbers of those rows, column after column, so that kWidth rows lie in a register.
struct Columns {
  Floats data;
  Columns(int64_t columns) : data(columns * kBlockRows) {}
  float* column(int64_t c) const { return data.get() + c * kBlockRows; }
};

struct Block {
  explicit Block(const Network& network)
      : obs(network.obs_size), actor(network.action_size), critic(1), d_actor(network.action_size), d_critic(1),
        both(network.trunks.size() == 1 ? network.num_features : 0) {
    for (const auto& layers : network.trunks) {
      hidden.emplace_back();
      slope.emplace_back();
      standard.emplace_back();
      for (const Matrix& matrix : layers) {
        hidden.back().emplace_back(matrix.columns);
        slope.back().emplace_back(matrix.columns);
        if (network.layer_norm) standard.back().emplace_back(matrix.columns + 1);
      }
    }
  }

  const Rows& features(int64_t trunk) const { return hidden[trunk].empty() ? obs : hidden[trunk].back(); }

  Rows obs;
  Columns actor, critic;                         // logits, then means; values
  Rows d_actor, d_critic;                        // the gradient of the loss with respect to them
  std::vector<std::vector<Rows>> hidden, slope;  // by trunk and layer: outputs, and the activation's slope there, which `backward`
                                                 // turns into the gradient with respect to the layer's sums
  std::vector<std::vector<Rows>> standard;       // with layer normalisation: the standardised sums, then 1 / their std
  Rows both;                                     // what the actor's head adds to a shared trunk's gradient
};

// Below, what inner loops use is captured by value: a store through Vector may alias everything that lies in memory.

// put(row, column, sum) for each register of a product. `to` is a copy, not a member of something that a store may have changed.
inline auto put_rows(const Rows& out) {
  return [to = out.row(0), step = out.step](int64_t r, int64_t c, Vector sum) { store(to + r * step + c, sum); };
}

inline void apply_layer(const Rows& x, int64_t n, const Matrix& matrix, const float* packed, const Rows& out) {
  multiply(
      x.row(0), x.step, n, packed + matrix.panels, matrix.inner, matrix.columns,
      [bias = packed + matrix.bias](int64_t c) { return load(bias + c); }, put_rows(out));
}

inline void apply_head(const Rows& x, int64_t n, const Matrix& head, const float* packed, const float* turned, const Columns& out) {
  const float* bias = packed + head.bias;
  if (Network::is_narrow(head)) {
    multiply_few(x.row(0), x.step, n, packed + head.panels, head.inner, head.columns,
                 [&](int64_t r, int64_t a, Vector sum) { store(out.column(a) + r, sum + bias[a]); });
    return;
  }
  multiply(
      x.row(0), x.step, n, turned + head.turned, head.columns, head.inner, [=](int64_t c) { return load(bias + c); },
      [&](int64_t r, int64_t c, Vector sum) {
        for (int64_t lane = 0; lane < std::min<int64_t>(kWidth, head.inner - c); ++lane) out.column(c + lane)[r] = sum[lane];
      });
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

// What fills up n rows becomes zero again. An infinite input has made it NaN: inf times the zeros that fill up a matrix.
inline void clear_padding(const Rows& x, int64_t n, int64_t columns) {
  for (int64_t r = 0; r < n && columns < x.step; ++r) std::fill(x.row(r) + columns, x.row(r) + x.step, 0.0f);
}

// Those of a register's lanes that are columns, others zero. c: the first of them.
inline Vector only_columns(Vector x, int64_t c, int64_t columns) {
  return where(lanes() < static_cast<int32_t>(columns - c), x);
}

// policy/mlp.py `_normalized` of n rows of sums, in place.
inline void layer_norm(const Matrix& matrix, const float* packed, int64_t n, const Rows& x, const Rows& standard) {
  const int64_t columns = matrix.columns, width = padded(columns);
  const auto number = static_cast<float>(columns);
  for (int64_t r = 0; r < n; ++r) {
    float *to = x.row(r), *row = standard.row(r);
    Vector total = {}, squares = {};
    for (int64_t c = 0; c < width; c += kWidth) total += only_columns(load(to + c), c, columns);
    const Vector mean = spread_sum(total) / number;
    for (int64_t c = 0; c < width; c += kWidth) {
      const Vector deviation = only_columns(load(to + c) - mean, c, columns);
      store(row + c, deviation);
      squares += deviation * deviation;
    }
    const Vector inverse = 1.0f / sqrt(spread_sum(squares) / number + 1e-5f);
    for (int64_t c = 0; c < width; c += kWidth) {
      const Vector standardized = load(row + c) * inverse;
      store(row + c, standardized);
      store(to + c, standardized * load(packed + matrix.scale + c) + load(packed + matrix.shift + c));
    }
    row[columns] = inverse[0];
  }
}

// Its gradient: `delta`, with respect to the n rows of results, becomes that with respect to the sums. gradient (packed) += that of
// scale and shift. With g = delta * scale: (g - mean(g) - standard * mean(g * standard)) / std.
inline void backward_layer_norm(const Matrix& matrix, const float* packed, int64_t n, const Rows& delta, const Rows& standard,
                                float* gradient) {
  const int64_t columns = matrix.columns, width = padded(columns);
  const auto number = static_cast<float>(columns);
  add_rows(delta.row(0), delta.step, n, columns, gradient + matrix.shift);
  for (int64_t r = 0; r < n; ++r) {
    float* to = delta.row(r);
    const float* row = standard.row(r);
    Vector total = {}, along = {};
    for (int64_t c = 0; c < width; c += kWidth) {
      const Vector from = load(to + c), standardized = only_columns(load(row + c), c, columns);
      const Vector scaled = from * load(packed + matrix.scale + c);
      store(gradient + matrix.scale + c, load(gradient + matrix.scale + c) + from * standardized);
      store(to + c, scaled);
      total += scaled;
      along += scaled * standardized;
    }
    const Vector mean = spread_sum(total) / number, slope = spread_sum(along) / number;
    for (int64_t c = 0; c < width; c += kWidth) {
      store(to + c, only_columns((load(to + c) - mean - load(row + c) * slope) * row[columns], c, columns));
    }
  }
}

template <Activation kind>
void forward_trunk(const std::vector<Matrix>& layers, const float* packed, int64_t n, const Block& block, int64_t trunk) {
  const Rows* x = &block.obs;
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const Rows& hidden = block.hidden[trunk][layer];
    apply_layer(*x, n, layers[layer], packed, hidden);
    if (layers[layer].scale) layer_norm(layers[layer], packed, n, hidden, block.standard[trunk][layer]);
    activate<kind>(n, hidden, block.slope[trunk][layer]);
    x = &hidden;
  }
  if (!layers.empty()) clear_padding(*x, n, layers.back().columns);
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

// block.actor and block.critic of the n rows in block.obs. turned: from transpose_heads.
inline void forward(const Network& network, const float* packed, const float* turned, int64_t n, const Block& block) {
  const auto last = static_cast<int64_t>(network.trunks.size()) - 1;
  for (int64_t trunk = 0; trunk <= last; ++trunk) forward_trunk(network, packed, n, block, trunk);
  apply_head(block.features(0), n, network.actor_head, packed, turned, block.actor);
  apply_head(block.features(last), n, network.critic_head, packed, turned, block.critic);
}

// gradient (packed) += that of n rows of one head, whose output has the gradient `d_out`.
inline void backward_head(const Matrix& head, const Rows& x, const Rows& d_out, int64_t n, float* gradient) {
  add_outer_products(d_out.row(0), d_out.step, x.row(0), x.step, n, head.inner, head.columns, gradient + head.panels);
  add_rows(d_out.row(0), d_out.step, n, head.inner, gradient + head.bias);
}

// gradient (packed) += that of n rows of one trunk, from block.d_actor and block.d_critic of the heads on it, after `forward`.
// turned: from transpose_layers.
inline void backward_trunk(const Network& network, const float* packed, const float* turned, int64_t n, const Block& block,
                           size_t trunk, float* gradient) {
  const auto back = [&](const Rows& delta, const float* panels, int64_t inner, int64_t columns, auto put) {
    multiply(delta.row(0), delta.step, n, panels, inner, columns, [](int64_t) { return Vector{}; }, put);
  };
  const auto times = [](const Rows& slope) {  // the sums times a layer's slope, in its place
    return [to = slope.row(0), step = slope.step](int64_t r, int64_t c, Vector sum) {
      float* place = to + r * step + c;
      store(place, sum * load(place));
    };
  };
  const auto& layers = network.trunks[trunk];
  const auto& slopes = block.slope[trunk];
  const bool shared = network.trunks.size() == 1, is_actor = trunk == 0;
  const Matrix& head = shared || !is_actor ? network.critic_head : network.actor_head;
  const Rows& d_head = shared || !is_actor ? block.d_critic : block.d_actor;
  backward_head(head, block.features(trunk), d_head, n, gradient);
  if (shared) backward_head(network.actor_head, block.features(trunk), block.d_actor, n, gradient);
  if (layers.empty()) return;
  if (shared) {
    const Matrix& actor_head = network.actor_head;
    back(block.d_actor, packed + actor_head.panels, actor_head.inner, actor_head.columns, put_rows(block.both));
    back(d_head, packed + head.panels, head.inner, head.columns,
         [from = block.both.row(0), step = block.both.step, put = times(slopes.back())](int64_t r, int64_t c, Vector sum) {
           put(r, c, sum + load(from + r * step + c));
         });
  } else {
    back(d_head, packed + head.panels, head.inner, head.columns, times(slopes.back()));
  }
  for (size_t layer = layers.size(); layer-- > 0;) {
    const Matrix& matrix = layers[layer];
    const Rows &x = layer > 0 ? block.hidden[trunk][layer - 1] : block.obs, &delta = slopes[layer];
    if (matrix.scale) backward_layer_norm(matrix, packed, n, delta, block.standard[trunk][layer], gradient);
    add_outer_products(x.row(0), x.step, delta.row(0), delta.step, n, matrix.inner, matrix.columns, gradient + matrix.panels);
    add_rows(delta.row(0), delta.step, n, matrix.columns, gradient + matrix.bias);
    if (layer > 0) back(delta, turned + matrix.turned, matrix.columns, matrix.inner, times(slopes[layer - 1]));
  }
}

}  // namespace fastppo
