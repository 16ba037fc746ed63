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

// The same number, of which the compiler does not know that. It would keep an address for each row, more than there are registers.
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
inline void multiply(const float* x, int64_t x_step, int64_t n, const float* panels, int64_t inner, int64_t columns, Begin begin,
                     Put put) {
  for_panels(columns, [&]<int kVectors>(int64_t c) {
    const float* panel = panels + c * inner;
    for_tiles(n, [&]<int kRows>(int64_t r) {
      Vector sum[kRows][kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const Vector start = begin(c + v * kWidth);
        for (int i = 0; i < kRows; ++i) sum[i][v] = start;
      }
      const float* rows[(kRows + 2) / 3];  // every third: the others are reached by an address with the step in it
      for (int i = 0; i < kRows; i += 3) rows[i / 3] = x + (r + i) * x_step;
      const float* b = panel;
      for (int64_t k = 0; k < inner; ++k, b += kVectors * kWidth) {
        const int64_t step = opaque(x_step);
        Vector right[kVectors];
        for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kWidth);
        for (int i = 0; i < kRows; ++i) {
          const Vector left = broadcast(*(rows[i / 3] + i % 3 * step));
          for (int v = 0; v < kVectors; ++v) sum[i][v] += left * right[v];
        }
        for (int i = 0; i < kRows; i += 3) ++rows[i / 3];
      }
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) put(r + i, c + v * kWidth, sum[i][v]);
      }
    });
  });
}

// G += x^T y over n rows, G (inner, columns) in panels: the gradient of a matrix. x (n, x_step), y (n, y_step).
inline void add_outer_products(const float* x, int64_t x_step, const float* y, int64_t y_step, int64_t n, int64_t inner,
                               int64_t columns, float* panels) {
  for_panels(columns, [&]<int kVectors>(int64_t c) {
    for_tiles(inner, [&]<int kRows>(int64_t k) {
      float* out = panels + c * inner + k * kVectors * kWidth;
      Vector sum[kRows][kVectors];
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) sum[i][v] = load(out + (i * kVectors + v) * kWidth);
      }
      const float* left_row = x + k;
      const float* right_row = y + c;
      for (int64_t r = 0; r < n; ++r, left_row += x_step, right_row += y_step) {
        Vector right[kVectors];
        for (int v = 0; v < kVectors; ++v) right[v] = load(right_row + v * kWidth);
        for (int i = 0; i < kRows; ++i) {
          const Vector left = broadcast(left_row[i]);
          for (int v = 0; v < kVectors; ++v) sum[i][v] += left * right[v];
        }
      }
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) store(out + (i * kVectors + v) * kWidth, sum[i][v]);
      }
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
inline void multiply_few(const float* x, int64_t x_step, int64_t n, const float* panels, int64_t inner, int64_t columns, Put put) {
  for (int64_t r = 0; r < n; r += kWidth) {
    for (int64_t k = 0; k < inner; ++k) {
      Vector sum[kWidth] = {};
      for_panels(columns, [&]<int kVectors>(int64_t c) {
        for (int v = 0; v < kVectors; ++v) {
          const Vector right = load(panels + c * inner + (k * kVectors + v) * kWidth);
          const int64_t step = opaque(x_step);
          for (int i = 0; i < kWidth; ++i) sum[i] += load(x + (r + i) * step + c + v * kWidth) * right;
        }
      });
      put(r, k, totals(sum));
    }
  }
}

// The panels of B^T (columns, inner), from those of B (inner, columns). What fills up rows stays as it is: zero.
inline void transpose(const float* panels, int64_t inner, int64_t columns, float* out) {
  for (int64_t k = 0; k < inner; k += kWidth) {
    for (int64_t c = 0; c < columns; c += kWidth) {
      Vector x[kWidth] = {};
      for (int64_t i = 0; i < std::min<int64_t>(kWidth, inner - k); ++i) x[i] = load(panels + in_panels(inner, columns, k + i, c));
      transpose(x);
      for (int64_t i = 0; i < std::min<int64_t>(kWidth, columns - c); ++i) store(out + in_panels(columns, inner, c + i, k), x[i]);
    }
  }
}

}  // namespace fastppo
