package partition_test

import (
	"testing"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/bitstest"
	"github.com/flipside-linux/flipside/partition/devicetest"
	"github.com/flipside-linux/flipside/partition/gptimage"
)

// inTable is a machine whose boot loader goes by the bits in the partition table.
type inTable struct {
	dev  *devicetest.Memory
	boot func(*partition.Disk) (partition.Slot, error)
}

func (m inTable) Open(*testing.T) *partition.Disk {
	return partition.NewDisk(m.dev, partition.Options{})
}

func (m inTable) Boot(t *testing.T) string {
	t.Helper()
	s, err := m.boot(m.Open(t))
	if err != nil {
		t.Fatal(err)
	}
	return s.Label
}

// TestBitsInTable: the conformance suite of boot backends, with the bits in the partition table, under each boot loader that goes by them.
func TestBitsInTable(t *testing.T) {
	for name, boot := range map[string]func(*partition.Disk) (partition.Slot, error){
		"GRUB":          func(d *partition.Disk) (partition.Slot, error) { s, _, err := d.Boot(partition.GRUB); return s, err },
		"UEFI":          func(d *partition.Disk) (partition.Slot, error) { s, _, err := d.Boot(partition.UEFI); return s, err },
		"flipside-init": func(d *partition.Disk) (partition.Slot, error) { return d.Take() },
	} {
		t.Run(name, func(t *testing.T) {
			bitstest.Run(t, func(t *testing.T, bits []bitstest.State) bitstest.Machine {
				l := bitstest.Layout(bits)
				for i, b := range bits {
					l.Parts[i].Attributes = gptimage.Attributes(b.Priority, b.Tries, b.Successful)
				}
				return inTable{bitstest.Device(t, l), boot}
			})
		})
	}
}
