// A plan: many steps in one native call, run by one team of threads that meets at barriers between them.
//
// The operands of its steps are affine in the values given to each run: offset + scale * values[slot], or a constant
// (slot -1). Values are base addresses (the arena of intermediate results, inputs, outputs) and sizes that are only
// known at run time. A plan holds one arena's worth of state, so its runs exclude each other; different plans do not.
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

std::map<std::string, MakePlannedStep>& step_makers() {
  static std::map<std::string, MakePlannedStep> makers;
  return makers;
}

using PyOperand = std::tuple<int, int64_t, int64_t>;                   // slot, scale, offset
using PyStep = std::tuple<std::string, std::vector<PyOperand>, bool>;  // op, operands, barrier afterwards

class Plan {
 public:
  Plan(const std::vector<PyStep>& steps, int num_values) : num_values_(num_values) {
    for (const auto& [op, operands, barrier] : steps) add(op, operands, barrier);
  }

  void run(const std::vector<int64_t>& values, int threads, int isa) { run_noting(values, threads, isa, nullptr); }

  // Runs, and returns the name of each step with the seconds that the first thread spent in it, waiting included.
  std::vector<std::pair<std::string, double>> profile(const std::vector<int64_t>& values, int threads, int isa) {
    std::vector<Clock::time_point> ends(entries_.size() + 1);
    run_noting(values, threads, isa, ends.data());
    std::vector<std::pair<std::string, double>> spent;
    for (size_t i = 0; i < entries_.size(); ++i) {
      spent.emplace_back(entries_[i].op, std::chrono::duration<double>(ends[i + 1] - ends[i]).count());
    }
    return spent;
  }

  size_t num_steps() const { return entries_.size(); }
  size_t num_barriers() const {
    return size_t(std::count_if(entries_.begin(), entries_.end(), [](const Entry& e) { return e.barrier; }));
  }

 private:
  using Clock = std::chrono::steady_clock;
  struct Operand {
    int slot;
    int64_t scale, offset;
  };
  struct Entry {
    std::string op;
    std::unique_ptr<PlannedStep> step;
    std::vector<Operand> operands;
    bool barrier;
  };

  void run_noting(const std::vector<int64_t>& values, int threads, int isa, Clock::time_point* ends) {
    QWENOPT_CHECK(int(values.size()) == num_values_, "plan: ", values.size(), " values; it was made for ", num_values_);
    QWENOPT_CHECK(threads >= 1, "plan: ", threads, " threads; threads must be at least 1");
    py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    int members = 1;
    for (Entry& entry : entries_) {
      bind(entry, values, threads, isa);
      members = std::max(members, entry.step->members());
    }
    in_team(members, [this, ends](const Team& team) { run_steps(team, ends); });
    for (Entry& entry : entries_) entry.step->finish();  // the first that failed raises
  }

  void add(const std::string& op, const std::vector<PyOperand>& operands, bool barrier) {
    const auto maker = step_makers().find(op);
    QWENOPT_CHECK(maker != step_makers().end(), "plan: step ", op, "; there is no op of that name");
    Entry entry{op, maker->second(), {}, barrier};
    QWENOPT_CHECK(int(operands.size()) == entry.step->num_operands(), "plan: step ", op, " with ", operands.size(),
                  " operands; it takes ", entry.step->num_operands());
    for (const auto& [slot, scale, offset] : operands) {
      QWENOPT_CHECK(slot >= -1 && slot < num_values_, "plan: step ", op, ": slot ", slot, "; there are ", num_values_,
                    " values");
      entry.operands.push_back({slot, scale, offset});
    }
    entry.barrier = entry.barrier || entry.step->can_fail();
    entries_.push_back(std::move(entry));
  }

  void bind(Entry& entry, const std::vector<int64_t>& values, int threads, int isa) {
    bound_.clear();
    for (const Operand& o : entry.operands) {
      bound_.push_back(o.slot < 0 ? o.offset : o.offset + o.scale * values[size_t(o.slot)]);
    }
    entry.step->bind(bound_.data(), threads, isa);
  }

  void run_steps(const Team& team, Clock::time_point* ends) {
    const auto note = [&](size_t i) {
      if (ends && team.id == 0) ends[i] = Clock::now();
    };
    note(0);
    for (size_t i = 0; i < entries_.size(); ++i) {
      Entry& entry = entries_[i];
      entry.step->run(team);
      if (entry.barrier) team.barrier();
      note(i + 1);
      if (entry.barrier && entry.step->failed()) return;
    }
  }

  int num_values_;
  std::vector<Entry> entries_;
  std::vector<int64_t> bound_;  // of the step that is being bound
  std::mutex mutex_;
};

}  // namespace

void register_step(const char* name, MakePlannedStep make) { step_makers()[name] = make; }

void register_plan(py::module_& m) {
  py::class_<Plan>(m, "Plan", "Many steps in one call; see docs/kernels.md")
      .def(py::init<const std::vector<PyStep>&, int>(), py::arg("steps"), py::arg("num_values"))
      .def("run", &Plan::run, py::arg("values"), py::arg("threads"), py::arg("isa") = -1)
      .def("profile", &Plan::profile, py::arg("values"), py::arg("threads"), py::arg("isa") = -1)
      .def_property_readonly("num_steps", &Plan::num_steps)
      .def_property_readonly("num_barriers", &Plan::num_barriers);
}

}  // namespace qwenopt
