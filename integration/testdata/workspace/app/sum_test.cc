#include <iostream>

#include "lib/sum.h"

int main() {
  if (Sum(2, 3) != 5) {
    std::cerr << "Sum(2, 3) = " << Sum(2, 3) << ", want 5" << std::endl;
    return 1;
  }
}
