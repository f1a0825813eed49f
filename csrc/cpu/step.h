// A step: one op with its arguments, checked, ready to be run by all members of a team. Alone it is a native call; in
// a plan it is one of many.
//
// A step has `int members` (how many threads it is worth), `void run(const Team&)` (called by every member of the team,
// which may be larger or smaller than `members`), and `void finish()` (afterwards, by the caller; may throw). One that
// can fail has `bool failed() const` as well: what follows it in a plan is then left out. A step is copied before it
// runs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "parallel.h"

namespace qwenopt {

// Rows of element-wise ops: one call kernel(args, begin, end) per member.
template <class Args>
struct RowsStep {
  using Kernel = void (*)(const Args&, int64_t, int64_t);
  Kernel kernel;
  Args args;
  int64_t rows;
  int members;

  // `cols` in elements of a norm. A fork costs a few microseconds, which is what one thread needs for about 16k of
  // them, so less than that per thread is not worth forking for.
  RowsStep(Kernel kernel, const Args& args, int64_t rows, int64_t cols, int threads)
      : kernel(kernel), args(args), rows(rows) {
    constexpr int64_t kGrain = 16 * 1024;
    int64_t useful = rows * cols / kGrain;
    if (useful > rows) useful = rows;
    if (useful < 1) useful = 1;
    members = useful < threads ? int(useful) : threads;
  }

  void run(const Team& team) {
    int64_t begin, end;
    team.share(rows, members, &begin, &end);
    if (begin < end) kernel(args, begin, end);
  }
  void finish() {}
};

// The step that `make(arguments...)` returns, as a Python function of the same arguments.
template <class Made, class... Values>
auto alone(Made (*make)(Values...)) {
  return [make](Values... values) {
    pybind11::gil_scoped_release release;
    Made step = make(values...);
    in_team(step.members, [&](const Team& team) { step.run(team); });
    step.finish();
  };
}

template <class S, class = void>
struct CanFail : std::false_type {};
template <class S>
struct CanFail<S, std::void_t<decltype(std::declval<const S&>().failed())>> : std::true_type {};

// A step of a plan: bound to new operands before each run.
class PlannedStep {
 public:
  virtual ~PlannedStep() = default;
  virtual int num_operands() const = 0;
  virtual void bind(const int64_t* operands, int threads, int isa) = 0;
  virtual int members() const = 0;
  virtual void run(const Team& team) = 0;
  virtual void finish() = 0;
  virtual bool can_fail() const = 0;
  virtual bool failed() const = 0;
};

// An operand is 64 bits: an address, an integer, or the bits of a double.
template <class T>
T operand(int64_t bits) {
  if constexpr (std::is_floating_point_v<T>) {
    double value;
    std::memcpy(&value, &bits, sizeof(value));
    return T(value);
  } else {
    return T(bits);
  }
}

template <class Made, class... Values>
class PlannedStepOf : public PlannedStep {
 public:
  explicit PlannedStepOf(Made (*make)(Values...)) : make_(make) {}
  int num_operands() const override { return kNumOperands; }
  void bind(const int64_t* operands, int threads, int isa) override {
    bind_each(operands, threads, isa, std::make_index_sequence<kNumOperands>());
  }
  int members() const override { return step_->members; }
  void run(const Team& team) override { step_->run(team); }
  void finish() override { step_->finish(); }
  bool can_fail() const override { return CanFail<Made>::value; }
  bool failed() const override {
    if constexpr (CanFail<Made>::value) return step_->failed();
    return false;
  }

 private:
  static constexpr int kNumOperands = int(sizeof...(Values)) - 2;  // all but threads and isa
  template <size_t... I>
  void bind_each(const int64_t* operands, int threads, int isa, std::index_sequence<I...>) {
    step_.emplace(make_(operand<std::tuple_element_t<I, std::tuple<Values...>>>(operands[I])..., threads, isa));
  }

  Made (*make_)(Values...);
  std::optional<Made> step_;
};

using MakePlannedStep = std::unique_ptr<PlannedStep> (*)();

// Names the step for plans.
void register_step(const char* name, MakePlannedStep make);

template <auto make, class Made, class... Values>
std::unique_ptr<PlannedStep> planned(Made (*)(Values...)) {
  return std::make_unique<PlannedStepOf<Made, Values...>>(make);
}

// Defines the Python function `name` and the step of that name for plans, both from `make`.
template <auto make, class... Extra>
void define_step(pybind11::module_& m, const char* name, const Extra&... extra) {
  m.def(name, alone(make), extra...);
  register_step(name, [] { return planned<make>(make); });
}

}  // namespace qwenopt
