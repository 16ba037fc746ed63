// Matrix products of narrow blocks of rows. The right-hand matrix lies in panels, so that the inner loop reads it in order.
//
// A matrix (inner, columns) as panels: columns are padded to whole registers and cut into panels of two registers, the last of
// one if one is left. A panel is (inner, its columns), panel after panel. Rows of blocks are padded to whole registers.
#pragma once

#include <algorithm>

#include "vector.h"

namespace fastppo {

// Where element (row, column) of a matrix with `inner` rows lies in its panels.
inline int64_t in_panels(int64_t inner, int64_t columns, int64_t row, int64_t column) {
  const int64_t first = column / (2 * kWidth) * (2 * kWidth);
  const int64_t width = padded(columns) - first >= 2 * kWidth ? 2 * kWidth : kWidth;
  return first * inner + row * width + column - first;
}

// The same number, hidden from the compiler: if it knew that a step never changes, it would keep an address for each row, which is
// more than there are registers.
inline int64_t opaque(int64_t number) {
  asm("" : "+r"(number));
  return number;
}

// Call body<kVectors>(first column) for each panel.
template <class Body>
inline void for_panels(int64_t columns, Body body) {
  const int64_t width = padded(columns);
  int64_t c = 0;
  for (; c + 2 * kWidth <= width; c += 2 * kWidth) body.template operator()<2>(c);
  if (c < width) body.template operator()<1>(c);
}

// Call body<kRows>(first row) for tiles of all n rows, few of them small.
template <class Body>
inline void for_tiles(int64_t n, Body body) {
  int64_t r = 0;
  for (; r + kTileRows <= n; r += kTileRows) body.template operator()<kTileRows>(r);
  if constexpr (kTileRows > 8) {
    if (r + 8 <= n) {
      body.template operator()<8>(r);
      r += 8;
    }
  }
  if (r + 4 <= n) {
    body.template operator()<4>(r);
    r += 4;
  }
  if (r + 2 <= n) {
    body.template operator()<2>(r);
    r += 2;
  }
  if (r < n) body.template operator()<1>(r);
}

// y = x B for n rows: `put(row, column, sum)` takes each register of the result. x (n, x_step), B (inner, columns) in panels.
// begin(column) is what sums start from: a bias.
template <class Begin, class Put>
FASTPPO_FLAT inline void multiply(const float* x, int64_t x_step, int64_t n, const float* panels, int64_t inner, int64_t columns,
                                  Begin begin, Put put) {
  for_panels(columns, [&]<int kVectors>(int64_t c) {
    const float* panel = panels + c * inner;
    for_tiles(n, [&]<int kRows>(int64_t r) {
      Vector sum[kRows][kVectors];
      unrolled<kVectors>([&](auto v) {
        const Vector start = begin(c + v * kWidth);
        unrolled<kRows>([&](auto i) { sum[i][v] = start; });
      });
      constexpr int kThirds = (kRows + 2) / 3;
      const float* rows[kThirds];  // every third: the others are reached by an address with the step in it
      unrolled<kThirds>([&](auto i) { rows[i] = x + (r + 3 * i) * x_step; });
      const float* b = panel;
      for (int64_t k = 0; k < inner; ++k, b += kVectors * kWidth) {
        const int64_t step = opaque(x_step);
        Vector right[kVectors];
        unrolled<kVectors>([&](auto v) { right[v] = load(b + v * kWidth); });
        unrolled<kRows>([&](auto i) {
          const Vector left = broadcast(*(rows[i / 3] + i % 3 * step));
          unrolled<kVectors>([&](auto v) { sum[i][v] += left * right[v]; });
        });
        unrolled<kThirds>([&](auto i) { ++rows[i]; });
      }
      unrolled<kRows>([&](auto i) { unrolled<kVectors>([&](auto v) { put(r + i, c + v * kWidth, sum[i][v]); }); });
    });
  });
}

// G += x^T y over n rows, G (inner, columns) in panels: the gradient of a matrix. x (n, x_step), y (n, y_step).
FASTPPO_FLAT inline void add_outer_products(const float* x, int64_t x_step, const float* y, int64_t y_step, int64_t n,
                                            int64_t inner, int64_t columns, float* panels) {
  for_panels(columns, [&]<int kVectors>(int64_t c) {
    for_tiles(inner, [&]<int kRows>(int64_t k) {
      float* out = panels + c * inner + k * kVectors * kWidth;
      Vector sum[kRows][kVectors];
      unrolled<kRows>([&](auto i) { unrolled<kVectors>([&](auto v) { sum[i][v] = load(out + (i * kVectors + v) * kWidth); }); });
      const float* left_row = x + k;
      const float* right_row = y + c;
      for (int64_t r = 0; r < n; ++r, left_row += x_step, right_row += y_step) {
        Vector right[kVectors];
        unrolled<kVectors>([&](auto v) { right[v] = load(right_row + v * kWidth); });
        unrolled<kRows>([&](auto i) {
          const Vector left = broadcast(left_row[i]);
          unrolled<kVectors>([&](auto v) { sum[i][v] += left * right[v]; });
        });
      }
      unrolled<kRows>([&](auto i) { unrolled<kVectors>([&](auto v) { store(out + (i * kVectors + v) * kWidth, sum[i][v]); }); });
    });
  });
}

// out += the sum over n rows of y: the gradient of a bias.
inline void add_rows(const float* y, int64_t y_step, int64_t n, int64_t columns, float* out) {
  for (int64_t c = 0; c < padded(columns); c += kWidth) {
    Vector sum = load(out + c);
    for (int64_t r = 0; r < n; ++r) sum += load(y + r * y_step + c);
    store(out + c, sum);
  }
}

// y = x B^T for n rows, where B (inner, columns) in panels has few rows: put(row, column, sums) takes kWidth rows of a column at a
// time. x has memory for whole registers of rows; what is in those after n has no meaning.
template <class Put>
FASTPPO_FLAT inline void multiply_few(const float* x, int64_t x_step, int64_t n, const float* panels, int64_t inner,
                                      int64_t columns, Put put) {
  for (int64_t r = 0; r < n; r += kWidth) {
    for (int64_t k = 0; k < inner; ++k) {
      Vector sum[kWidth];
      unrolled<kWidth>([&](auto i) { sum[i] = Vector{}; });
      for_panels(columns, [&]<int kVectors>(int64_t c) {
        for (int v = 0; v < kVectors; ++v) {
          const Vector right = load(panels + c * inner + (k * kVectors + v) * kWidth);
          const int64_t step = opaque(x_step);
          unrolled<kWidth>([&](auto i) { sum[i] += load(x + (r + i) * step + c + v * kWidth) * right; });
        }
      });
      put(r, k, totals(sum));
    }
  }
}

// The panels of B^T (columns, inner), from those of B (inner, columns). Rows of `out` are filled up with zeros.
FASTPPO_FLAT inline void transpose(const float* panels, int64_t inner, int64_t columns, float* out) {
  for (int64_t k = 0; k < inner; k += kWidth) {
    const bool whole = k + kWidth <= inner;
    for (int64_t c = 0; c < columns; c += kWidth) {
      const float* from = panels + in_panels(inner, columns, k, c);
      float* to = out + in_panels(columns, inner, c, k);
      const int64_t from_step = in_panels(inner, columns, 1, c) - in_panels(inner, columns, 0, c);
      const int64_t to_step = in_panels(columns, inner, 1, k) - in_panels(columns, inner, 0, k);
      Vector x[kWidth];
      unrolled<kWidth>([&](auto i) { x[i] = whole || k + i < inner ? load(from + i * from_step) : Vector{}; });
      transpose(x);
      unrolled<kWidth>([&](auto i) {
        if (c + i < columns) store(to + i * to_step, x[i]);
      });
    }
  }
}

}  // namespace fastppo
