// Package partition reads and changes the boot bits of a GPT and writes to the inactive slot, so that at every instant, also
// after a power cut, the boot loader finds a slot that holds a complete, verified image.
package partition
