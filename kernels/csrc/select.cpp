// The k highest of each row, by bisection on the bits of the scores.
#include <algorithm>
#include <cstring>
#include <vector>

#include "host.hpp"
#include "parallel.hpp"

namespace fastrecycle {
namespace {

// Rises with the score: -inf lowest, the two zeros equal, every NaN above +inf, as torch.sort
// has them.
std::uint32_t key_of(float score) {
  std::uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  const std::uint32_t rising =
      bits >> 31 != 0 ? 0x80000000 - magnitude : 0x80000000 + magnitude;
  return magnitude > 0x7f800000 ? 0xffffffff : rising;
}

std::int64_t count_from(const std::uint32_t* keys, std::int64_t n, std::uint32_t least) {
  std::int64_t total = 0;
  constexpr std::int64_t block = 1 << 20;  // a 32-bit sum keeps the inner loop in vectors
  for (std::int64_t begin = 0; begin < n; begin += block) {
    const std::int64_t end = std::min(begin + block, n);
    std::uint32_t sum = 0;
    for (std::int64_t i = begin; i < end; ++i) sum += keys[i] >= least ? 1 : 0;
    total += sum;
  }
  return total;
}

void top_of_row(const float* scores, std::int64_t n, std::int64_t count, std::uint32_t* keys,
                std::int64_t* kept) {
  std::uint32_t low = 0xffffffff, high = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    keys[i] = key_of(scores[i]);
    low = std::min(low, keys[i]);
    high = std::max(high, keys[i]);
  }
  // keys >= low are at least `count`, keys > high fewer than that: low becomes the count-th key,
  // or any key that exactly `count` reach
  std::int64_t reached = n;
  while (low < high && reached != count) {
    const std::uint32_t middle = low + (high - low) / 2 + 1;
    const std::int64_t above = count_from(keys, n, middle);
    if (above >= count) {
      low = middle;
      reached = above;
    } else {
      high = middle - 1;
    }
  }
  // of the keys equal to `low` the first ones stay
  std::int64_t equal = count;
  if (reached != count) {
    const std::int64_t above = low == 0xffffffff ? 0 : count_from(keys, n, low + 1);
    equal = count - above;
  }
  std::int64_t position = 0;
  for (std::int64_t i = 0; position < count; ++i) {
    const bool tie = keys[i] == low;
    const bool keep = tie ? equal > 0 : keys[i] > low;
    equal -= tie ? 1 : 0;
    kept[position] = i;
    position += keep ? 1 : 0;
  }
}

}  // namespace

void top_k(const float* scores, std::int64_t images, std::int64_t patches, std::int64_t count,
           std::int64_t* kept, int threads) {
  if (count == 0) return;
  parallel(images, 3.0 * static_cast<double>(patches), threads,
           [&](std::int64_t begin, std::int64_t end) {
             std::vector<std::uint32_t> keys(static_cast<std::size_t>(patches));
             for (std::int64_t i = begin; i < end; ++i) {
               top_of_row(scores + i * patches, patches, count, keys.data(), kept + i * count);
             }
           });
}

}  // namespace fastrecycle
