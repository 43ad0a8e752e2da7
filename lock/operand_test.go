package lock

import (
	"os/exec"
	"testing"
)

func TestOperand(t *testing.T) {
	for name, args := range map[string]string{
		"node-1": "node-1\n", "1.2.0-rc.1+build": "1.2.0-rc.1+build\n", "x;echo${IFS}stolen;#": "x;echo${IFS}stolen;#\n", "$(id)": "$(id)\n", "`id`": "`id`\n", "it's": "it's\n",
		"--all": "--\n--all\n", "a b": "a b\n", "": "\n", "*": "*\n", `"`: "\"\n",
	} {
		out, err := exec.CommandContext(t.Context(), "sh", "-c", `printf '%s\n' operand: `+Operand(name)).CombinedOutput()
		if err != nil || string(out) != "operand:\n"+args {
			t.Errorf("%q: a shell makes of %s: %q, %v", name, Operand(name), out, err)
		}
	}
}
