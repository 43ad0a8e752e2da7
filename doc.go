// Package flipside is the module's root. It holds no code; its test keeps the imports of the rooms pointing one way.
// Start reading at package updater, or in the README.
package flipside
