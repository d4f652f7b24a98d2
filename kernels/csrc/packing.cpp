// Plans of packed batches: each image's prefix tokens, then its kept patches, ascending.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "host.hpp"
#include "parallel.hpp"

namespace fastrecycle {

void count_kept(const std::uint8_t* mask, std::int64_t images, std::int64_t patches,
                std::int64_t prefix, std::int64_t* starts, int threads) {
  starts[0] = 0;
  parallel(images, 0.1 * static_cast<double>(patches), threads,
           [&](std::int64_t begin, std::int64_t end) {
             for (std::int64_t i = begin; i < end; ++i) {
               const std::uint8_t* row = mask + i * patches;
               std::int64_t kept = 0;
               for (std::int64_t j = 0; j < patches; ++j) kept += row[j] != 0 ? 1 : 0;
               starts[i + 1] = prefix + kept;
             }
           });
  for (std::int64_t i = 0; i < images; ++i) starts[i + 1] += starts[i];
}

void mark_kept(const std::int64_t* order, const std::int64_t* counts, std::int64_t images,
               std::int64_t width, std::int64_t patches, std::uint8_t* mask, int threads) {
  parallel(images, static_cast<double>(width), threads,
           [&](std::int64_t begin, std::int64_t end) {
             for (std::int64_t i = begin; i < end; ++i) {
               std::uint8_t* row = mask + i * patches;
               for (std::int64_t j = 0; j < counts[i]; ++j) {
                 const std::int64_t patch = order[i * width + j];
                 const bool inside = patch >= 0 && patch < patches;
                 if (!inside || row[patch] != 0) {
                   const std::string named = "plan_packed: order[" + std::to_string(i) +
                                             "] names patch " + std::to_string(patch);
                   throw std::invalid_argument(
                       inside ? named + " twice; expected each patch at most once"
                              : named + "; expected patches 0 to " + std::to_string(patches - 1));
                 }
                 row[patch] = 1;
               }
             }
           });
}

void plan(const std::uint8_t* mask, const std::int64_t* starts, std::int64_t images,
          std::int64_t patches, std::int64_t prefix, const Packing& out, int threads) {
  const std::int64_t tokens = prefix + patches;
  parallel(images, 1.5 * static_cast<double>(tokens), threads,
           [&](std::int64_t begin, std::int64_t end) {
             // one more than fits: the slot after the last is written before it is known unkept
             std::vector<std::int64_t> kept(static_cast<std::size_t>(patches) + 1);
             for (std::int64_t i = begin; i < end; ++i) {
               const std::uint8_t* row = mask + i * patches;
               std::int64_t count = 0;
               for (std::int64_t j = 0; j < patches; ++j) {
                 kept[static_cast<std::size_t>(count)] = j;
                 count += row[j] != 0 ? 1 : 0;
               }
               const std::int64_t packed = starts[i], full = i * tokens;
               const std::int64_t before = packed - i * prefix;  // patches of earlier images
               std::int64_t* scatter = out.scatter + full;
               std::fill(scatter, scatter + tokens, -1);
               for (std::int64_t p = 0; p < prefix; ++p) {
                 out.gather[packed + p] = full + p;
                 out.merge[packed + p] = i * prefix + p;
                 scatter[p] = packed + p;
               }
               for (std::int64_t j = 0; j < count; ++j) {
                 const std::int64_t patch = kept[static_cast<std::size_t>(j)];
                 const std::int64_t to = packed + prefix + j;
                 out.gather[to] = full + prefix + patch;
                 out.merge[to] = images * prefix + before + j;
                 out.patches[before + j] = patch;
                 out.image[before + j] = i;
                 scatter[prefix + patch] = to;
               }
             }
           });
}

}  // namespace fastrecycle
