// Argument checks: "<op>: what was given; what is needed", as a Python ValueError or IndexError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace qwenopt {

template <class... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace qwenopt

#define QWENOPT_CHECK(condition, ...)                                            \
  do {                                                                           \
    if (!(condition)) throw std::invalid_argument(::qwenopt::join(__VA_ARGS__)); \
  } while (0)

#define QWENOPT_CHECK_RANGE(condition, ...)                                  \
  do {                                                                       \
    if (!(condition)) throw std::out_of_range(::qwenopt::join(__VA_ARGS__)); \
  } while (0)
