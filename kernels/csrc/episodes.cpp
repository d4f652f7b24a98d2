// Few-shot tasks, word for word as NumPy's Philox and Generator draw them.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "host.hpp"
#include "parallel.hpp"
#include "philox.hpp"

namespace fastrecycle {
namespace {

struct Ranked {
  std::uint64_t word;
  std::int64_t position;
  bool operator<(const Ranked& other) const {
    return word != other.word ? word < other.word : position < other.position;
  }
};

// Uniform draws without replacement: the positions of the `count` smallest of `population` random
// words, smallest first, the earlier of equals. Only words below a bound that nearly always lets
// enough through are sorted.
class Draw {
 public:
  // The first `count` entries hold until the next call.
  const Ranked* operator()(Philox& random, std::int64_t population, std::int64_t count) {
    words_.resize(static_cast<std::size_t>(population));
    ranked_.resize(words_.size() + 1);  // a slot is written before it is known to count
    random.fill(words_.data(), population);
    const double wanted = static_cast<double>(count);
    const double share = (wanted + 3 * std::sqrt(wanted) + 2) / static_cast<double>(population);
    const std::uint64_t all = ~std::uint64_t{0};
    const std::uint64_t bound =
        share < 0.9 ? static_cast<std::uint64_t>(share * 18446744073709551616.0) : all;
    std::size_t below = pick(bound);
    if (below < static_cast<std::size_t>(count)) below = pick(all);
    std::sort(ranked_.data(), ranked_.data() + below);
    return ranked_.data();
  }

 private:
  std::size_t pick(std::uint64_t bound) {
    std::size_t below = 0;
    for (std::size_t i = 0; i < words_.size(); ++i) {
      ranked_[below] = {words_[i], static_cast<std::int64_t>(i)};
      below += words_[i] <= bound ? 1 : 0;
    }
    return below;
  }

  std::vector<std::uint64_t> words_;
  std::vector<Ranked> ranked_;
};

}  // namespace

void draw_episodes(const std::int64_t* names, const std::int64_t* starts,
                   const std::int64_t* members, std::int64_t classes_in_all, std::int64_t ways,
                   std::int64_t shots, std::int64_t queries, std::int64_t tasks,
                   std::uint64_t seed, std::int64_t* classes, std::int64_t* support,
                   std::int64_t* query, int threads) {
  const double images =
      static_cast<double>(starts[classes_in_all]) / static_cast<double>(classes_in_all);
  const double task_ns = 4 * (static_cast<double>(classes_in_all) +
                              static_cast<double>(ways) * images);
  parallel(tasks, task_ns, threads, [&](std::int64_t begin, std::int64_t end) {
    Draw draw_classes, draw_images;
    for (std::int64_t task = begin; task < end; ++task) {
      Philox random(seed, static_cast<std::uint64_t>(task));
      const Ranked* chosen = draw_classes(random, classes_in_all, ways);
      for (std::int64_t way = 0; way < ways; ++way) {
        const std::int64_t position = chosen[way].position;
        const std::int64_t* own = members + starts[position];
        const Ranked* drawn =
            draw_images(random, starts[position + 1] - starts[position], shots + queries);
        const std::int64_t row = task * ways + way;
        classes[row] = names[position];
        for (std::int64_t i = 0; i < shots; ++i) {
          support[row * shots + i] = own[drawn[i].position];
        }
        for (std::int64_t i = 0; i < queries; ++i) {
          query[row * queries + i] = own[drawn[shots + i].position];
        }
      }
    }
  });
}

namespace {

// numpy's Generator.choice(population, count, replace=False)
class Choice {
 public:
  const std::vector<std::int64_t>& operator()(Philox& random, std::int64_t population,
                                              std::int64_t count) {
    if (population > 10000 && count > population / 50) {
      drawn_.resize(static_cast<std::size_t>(population));
      std::iota(drawn_.begin(), drawn_.end(), std::int64_t{0});
      shuffle(random, std::max<std::int64_t>(population - count, 1));
      drawn_.erase(drawn_.begin(), drawn_.end() - count);
      return drawn_;
    }
    // Floyd's method, then a shuffle
    if (static_cast<std::int64_t>(taken_.size()) < population) {
      taken_.resize(static_cast<std::size_t>(population), 0);
    }
    ++draws_;
    drawn_.clear();
    for (std::int64_t last = population - count; last < population; ++last) {
      std::int64_t value = random.bounded(static_cast<std::uint32_t>(last));
      if (taken_[static_cast<std::size_t>(value)] == draws_) value = last;
      taken_[static_cast<std::size_t>(value)] = draws_;
      drawn_.push_back(value);
    }
    shuffle(random, 1);
    return drawn_;
  }

 private:
  void shuffle(Philox& random, std::int64_t first) {
    for (std::int64_t i = static_cast<std::int64_t>(drawn_.size()) - 1; i >= first; --i) {
      const std::uint32_t j = random.bounded(static_cast<std::uint32_t>(i));
      std::swap(drawn_[j], drawn_[static_cast<std::size_t>(i)]);
    }
  }

  std::vector<std::int64_t> drawn_;
  std::vector<std::uint64_t> taken_;  // the draw that took a position last
  std::uint64_t draws_ = 0;
};

}  // namespace

void draw_steps(const Tables& tables, std::int64_t ways, std::int64_t need, std::int64_t tasks,
                double interpolation, bool from_all, std::uint64_t seed, std::uint64_t first,
                std::int64_t steps, std::int64_t* rows, std::int64_t* labels, int threads) {
  const double step_ns = 10.0 * static_cast<double>(tasks * ways * (need + 1));
  parallel(steps, step_ns, threads, [&](std::int64_t begin, std::int64_t end) {
    Choice choose_classes, choose_rows;
    struct Source {
      const std::int64_t* rows;
      std::int64_t count;
    };
    std::vector<Source> sources(static_cast<std::size_t>(ways));
    auto cut = [](const std::int64_t* rows, const std::int64_t* starts, std::int64_t i) {
      return Source{rows + starts[i], starts[i + 1] - starts[i]};
    };
    for (std::int64_t step = begin; step < end; ++step) {
      Philox random(seed, first + static_cast<std::uint64_t>(step));
      for (std::int64_t task = 0; task < tasks; ++task) {
        std::int64_t* own_labels = labels + (step * tasks + task) * ways;
        std::int64_t* own_rows = rows + (step * tasks + task) * ways * need;
        if (random.uniform() < interpolation) {
          const auto& chosen = choose_classes(random, tables.class_count, ways);
          for (std::size_t way = 0; way < sources.size(); ++way) {
            const std::int64_t* of_class = tables.classes + chosen[way];
            const auto last = static_cast<std::uint32_t>(of_class[1] - of_class[0] - 1);
            const std::int64_t one = tables.holders[of_class[0] + random.bounded(last)];
            sources[way] = from_all ? cut(tables.shown, tables.shown_starts, chosen[way])
                                    : cut(tables.rows, tables.groups, one);
            own_labels[way] = -1;
          }
        } else {
          const std::uint32_t which =
              random.bounded(static_cast<std::uint32_t>(tables.wide_count - 1));
          const std::int64_t* lora = tables.wide + 2 * std::int64_t{which};
          const auto& chosen = choose_classes(random, lora[1], ways);
          for (std::size_t way = 0; way < sources.size(); ++way) {
            const std::int64_t group = lora[0] + chosen[way];
            sources[way] = cut(tables.rows, tables.groups, group);
            own_labels[way] = tables.labels[group];
          }
        }
        for (const Source& source : sources) {
          for (const std::int64_t i : choose_rows(random, source.count, need)) {
            *own_rows++ = source.rows[i];
          }
        }
      }
    }
  });
}

}  // namespace fastrecycle
