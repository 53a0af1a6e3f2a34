#include <iostream>

#include "primes.h"

int main() {
  const std::vector<int> want = {2, 3, 5, 7, 11, 13};
  if (Primes(13) != want) {
    std::cerr << "Primes(13) is not 2, 3, 5, 7, 11, 13" << std::endl;
    return 1;
  }
}
