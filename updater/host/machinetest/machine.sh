#!/bin/bash
# One machine in namespaces: this host's own userland under an overlay, with its own processes, mounts, network, host name, cgroups and message
# queues, and the real systemd as its first process. A reboot through logind ends the first process with SIGHUP, which unshare turns into 129;
# power-off into 130 (reboot(2), in a pid namespace). Everything that it writes is in a tmpfs that ends with this script.
#
# usage: machine.sh NAME DIR. Before each boot it prints LOAD and waits for a line on standard input: whoever reads that is the boot loader, and
# leaves in DIR/boot what the slot holds. DIR/share is /var/lib/flipside in the machine.
set -u
N=$1 D=$2
export N D W=$D/w
mkdir -p "$W" "$D/boot" "$D/share"
cat >"$D/inner" <<'I'
set -e
for i in 1 2 3 4 5 6 7 8 9; do mount -t overlay -o lowerdir=/,upperdir=$W/up,workdir=$W/work overlay $W/m 2>/dev/null && break; sleep 0.05; done
cd $W/m
mount -t proc proc proc; mount -t sysfs -o ro sysfs sys; mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run; mount -t tmpfs tmpfs tmp; mount -t tmpfs -o mode=755 tmpfs dev
for n in null:3 zero:5 full:7 random:8 urandom:9; do mknod -m 666 dev/${n%:*} c 1 ${n#*:}; done; mknod -m 666 dev/tty c 5 0
mkdir dev/pts dev/shm; mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts; ln -s pts/ptmx dev/ptmx; mount -t tmpfs tmpfs dev/shm
cat /proc/sys/kernel/random/uuid >$W/bootid.$$; mount --bind $W/bootid.$$ proc/sys/kernel/random/boot_id
cp $W/bootid.$$ run/boot-id # for a service with a /proc of its own, where that mount is not
mkdir -p var/lib/flipside mnt/share; mount --bind $D/share var/lib/flipside; mount --bind $D/boot mnt
chmod 644 run/boot-id
if [ ! -e etc/machine-made ]; then
  touch etc/machine-made; printf %s "$N" | md5sum | cut -c1-32 >etc/machine-id; echo "$N" >etc/hostname; echo "127.0.0.1 localhost $N" >etc/hosts
  rm -rf etc/systemd/system/*.wants lib/systemd/system/multi-user.target.wants/getty.target usr/lib/systemd/system/multi-user.target.wants/getty.target
  mkdir -p var/log/journal
  ln -s /dev/null etc/systemd/system/systemd-sysctl.service # what it sets is not the machine's alone
fi
# What the slot holds is what the boot loader found there.
cp mnt/os-release usr/lib/os-release; mkdir -p usr/lib/flipside/flipside.toml.d; cp mnt/slot.toml usr/lib/flipside/flipside.toml.d/10-slot.toml
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=lxc chroot . /lib/systemd/systemd --unit=multi-user.target --log-target=journal --log-level=warning --show-status=no
I
exec unshare -m --propagation private bash -c '
mount -t tmpfs -o mode=755 tmpfs $W; mkdir $W/cg $W/up $W/work $W/m; mount -t cgroup2 cgroup2 $W/cg
C=$W/cg/flipside-$$
while echo LOAD && read -r line; do
  mkdir -p $C
  ( echo $BASHPID >$C/cgroup.procs; exec setpriv --pdeathsig KILL unshare -m -p -f -u -i -n -C --kill-child bash $D/inner ) & I=$!
  for i in $(seq 1 100); do P=$(cat /proc/$I/task/$I/children 2>/dev/null); [ -n "$P" ] && break; sleep 0.02; done
  echo "INIT $P"
  wait $I; rc=$?
  echo 1 >$C/cgroup.kill 2>/dev/null; for i in 1 2 3 4 5 6 7 8; do find $C -depth -type d -exec rmdir {} \; 2>/dev/null; [ -d $C ] || break; sleep 0.05; done
  echo "EXIT $rc"
  [ $rc = 129 ] || break
done'
